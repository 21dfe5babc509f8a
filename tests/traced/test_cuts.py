"""Parts of a model between two cuts."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny, tokens

from fp4graph.traced.cuts import Cut, Part, cuts
from fp4graph.traced.model import TracedModel
from fp4graph.traced.recorded import graph_inputs


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
@torch.no_grad()
def test_parts_take_what_they_use_and_compute_what_the_model_does(family: str) -> None:
    model = tiny(family)
    traced = TracedModel(model)
    inputs = {"input_ids": tokens(), "use_cache": False}
    expected = traced(**inputs).logits
    gm = traced.graphs[0].tagged
    found = cuts(gm)
    assert not isinstance(found, str)
    args = graph_inputs(traced, inputs)
    assert args is not None
    starts = [Cut(0, ()), *found]
    parts = [Part(gm, start, end) for start, end in zip(starts, [*found, None], strict=True)]
    values = ()
    for part in parts:
        values = part(args, values)
    assert any(isinstance(each, torch.Tensor) and torch.equal(each, expected) for each in values)
    taken = [len(part.gm.graph.find_nodes(op="placeholder")) for part in parts]
    assert max(taken) < 0.7 * len(args)
