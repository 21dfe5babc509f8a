"""A traced model, rewritten again and again: what the studies stand on."""

from __future__ import annotations

import pytest
import torch
from support.closer import relative_l2
from support.models import FAMILIES, dequantised, tiny, tokens

from fp4graph import Policy, Scheme, TracedModel


def logits(model: torch.nn.Module | TracedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_each_selection_equals_the_model_with_dequantised_weights(family: str) -> None:
    model = tiny(family).requires_grad_(False)
    traced = TracedModel(model)
    plain = logits(traced)
    assert torch.equal(plain, logits(model))
    for select in ("all", "blocks=1", "all"):
        report = traced.select(Policy.of(select, Scheme.of()))
        assert relative_l2(logits(traced), logits(dequantised(model, report))) < 1e-6
    traced.select(None)
    assert torch.equal(logits(traced), plain)
