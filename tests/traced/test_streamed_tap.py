"""What linears work on, block by block, is what it is in the whole model, to the bit."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.models import FAMILIES, tiny, tokens
from torch import Tensor, nn

from fp4graph import LinearTap, StreamedTap, StudyError, TracedModel
from fp4graph.mapped import MappedFile, is_mapped

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from fp4graph.traced.tap import Losses, Step

INPUTS = [{"input_ids": tokens(seed=seed), "use_cache": False} for seed in (0, 1, 2)]


def losses(index: int, logits: Tensor) -> Iterator[Tensor]:
    with torch.enable_grad():
        yield logits.square().sum()
        yield logits[..., index].sum()


class _Softer(nn.Module):
    """Gives other logits than its model's graph, as code outside of a graph may."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return _soften(self.inner(**inputs))


@torch._dynamo.disable
def _soften(out: Any) -> Any:
    out.logits = out.logits / 2
    return out


def traced(model: Any, *, grads: bool = True) -> TracedModel:
    found = TracedModel(model.requires_grad_(False))
    with torch.set_grad_enabled(grads):
        found.settle(**INPUTS[0])
    return found


def everything(steps: Iterable[Step]) -> dict[Any, list[Tensor]]:
    """Return all that a tap tells, by what it is of."""
    found: dict[Any, list[Tensor]] = defaultdict(list)
    for step in steps:
        for tag, calls in step.seen.items():
            found[tag.fqn, step.index, "x"] += [call.x for call in calls]
            found[tag.fqn, step.index, "weight"] += [call.weight for call in calls]
        for number, by_loss in enumerate(step.gradients):
            for tag, each in by_loss.items():
                found[tag.fqn, step.index, number] += each
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_whole_model_s(family: str, tmp_path: Path) -> None:
    check_against_the_whole_model(family, losses, tmp_path)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_inputs_are_the_whole_model_s(family: str, tmp_path: Path) -> None:
    check_against_the_whole_model(family, None, tmp_path)


def check_against_the_whole_model(family: str, losses: Losses | None, tmp_path: Path) -> None:
    model = traced(tiny(family), grads=losses is not None)
    tap = StreamedTap(model, INPUTS, tmp_path, losses)
    assert tap.refusal is None
    assert tap.parts == 3, "what is before the blocks, and two blocks"
    steps = list(tap.steps())
    assert len(steps) == 3 * len(INPUTS)
    found, whole = everything(steps), everything(LinearTap(model).steps(INPUTS, losses))
    assert found.keys() == whole.keys()
    assert len(found) > 10
    for what, values in found.items():
        assert all(map(torch.equal, values, whole[what])), what
    assert not list(tmp_path.iterdir())


def test_values_between_blocks_lie_in_files(tmp_path: Path) -> None:
    tap = StreamedTap(traced(tiny("llama")), INPUTS, tmp_path, losses)
    run = tap._runs[0]
    for number in (0, 1):
        tap._forward(number, run, MappedFile(tmp_path))
    assert run.live
    assert all(is_mapped(each) for each in run.live.values() if isinstance(each, Tensor))
    assert len(tap._needs_grad) == 1, "the residual stream, not the positions"


def test_says_why_not(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="traced anew"):
        StreamedTap(traced(tiny("llama")), INPUTS, tmp_path)
    torch._dynamo.reset()
    broken = tiny("llama")
    broken.model.layers[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    refusal = StreamedTap(traced(broken, grads=False), INPUTS, tmp_path).refusal
    assert refusal is not None
    assert "graphs of it" in refusal
    torch._dynamo.reset()
    softer = _Softer(tiny("llama"))
    refusal = StreamedTap(traced(softer, grads=False), INPUTS, tmp_path).refusal
    assert refusal == "its graph does not return the logits as they are"
