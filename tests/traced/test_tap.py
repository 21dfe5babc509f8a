"""What linears see, and the gradients by what they give, against hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.models import tiny, tokens
from torch import nn

from fp4graph import LinearTap, StudyError, TracedModel

if TYPE_CHECKING:
    from collections.abc import Callable


def traced(model: nn.Module, **inputs: object) -> TracedModel:
    found = TracedModel(model.requires_grad_(False))
    with torch.enable_grad():
        found(**inputs)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_those_of_hooks(family: str) -> None:
    model = tiny(family)
    inputs = {"input_ids": tokens(6, batch=2), "use_cache": False}
    tap = LinearTap(traced(model, **inputs))
    with torch.enable_grad():
        logits = tap(**inputs).logits
        losses = [logits.square().sum(), logits[..., 3].sum()]
    found = [tap.gradients(loss) for loss in losses]
    assert not any(parameter.requires_grad for parameter in model.parameters())

    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    assert {len(calls) for calls in tap.seen.values()} == {1}

    def hook(fqn: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> None:
            y.retain_grad()
            seen[fqn] = args[0], y

        return keep

    for tag in tap.seen:
        model.get_submodule(tag.fqn).register_forward_hook(hook(tag.fqn))
    model.requires_grad_(True)
    model(**inputs).logits.square().sum().backward()
    assert len(found[0]) == len(tap.seen) == len(seen)
    for tag, (gradient,) in found[0].items():
        x, y = seen[tag.fqn]
        assert y.grad is not None
        ours = tap.seen[tag][0].x
        torch.testing.assert_close(ours, x.view_as(ours))
        torch.testing.assert_close(gradient, y.grad.view_as(gradient), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[1][tag][0], gradient), "each loss has its own"


class _Turned(nn.Module):
    """`W @ x`: the result is [N, M]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight @ x.T).square()


def test_dimensions_are_last_however_the_graph_has_them() -> None:
    model, x = _Turned(), torch.randn(3, 16)
    tap = LinearTap(traced(model, x=x))
    with torch.enable_grad():
        out = tap(x=x)
        loss = out.sum()
    ((tag, (gradient,)),) = tap.gradients(loss).items()
    assert tap.seen[tag][0].x.shape == (3, 16)
    torch.testing.assert_close(gradient, 2 * x @ model.weight.T)


def test_a_call_that_it_cannot_see_is_an_error() -> None:
    inputs = {"input_ids": tokens(6), "use_cache": False}
    tap = LinearTap(traced(tiny("llama"), **inputs))
    with torch.no_grad(), pytest.raises(StudyError, match="gradients on that were off"):
        tap(**inputs)
