"""In-place operations: which nodes are some, what they reach, what that forbids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.closer import relative_l2
from support.recorder import Recorder
from torch import nn
from torch.nn.functional import linear, relu

import fp4graph
from fp4graph import RefusalError
from fp4graph.graph.writes import writes_in_place, written

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def _set(x: Tensor) -> None:
    x[0] = 1


def _add(x: Tensor) -> None:
    x += 1


STEPS: dict[str, tuple[Callable[[Tensor], object], bool]] = {
    "mul_": (lambda x: x.mul_(2), True),
    "+=": (_add, True),
    "x[0] = 1": (_set, True),
    "a view": (lambda x: x[:1].t().fill_(3), True),
    "out=": (lambda x: torch.add(x, 1, out=x), True),
    "inplace=True": (lambda x: relu(x, inplace=True), True),
    "copy_ of x": (lambda x: torch.zeros_like(x).copy_(x), False),
    "mul": (lambda x: x * 2, False),
    "a fresh tensor": (lambda x: (x + 1).mul_(2), False),
}


@pytest.mark.parametrize("step", STEPS)
def test_knows_what_is_written(step: str) -> None:
    change, writes = STEPS[step]

    def run(x: Tensor) -> Tensor:
        change(x)
        return x + 1

    recorder = Recorder()
    torch.compile(run, backend=recorder)(torch.rand(3, 3))
    assert recorder.gm is not None
    graph = recorder.gm.graph
    (x,) = (node for node in graph.nodes if node.op == "placeholder")
    assert (x in written(graph)) == writes
    if writes:
        assert any(writes_in_place(node) for node in graph.nodes)


@pytest.mark.parametrize("step", STEPS)
@torch.no_grad()
def test_an_input_is_quantised_again_after_a_write(step: str) -> None:
    change, _ = STEPS[step]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                [nn.ModuleDict({n: nn.Linear(32, 32, False) for n in ("gate_proj", "up_proj")})]
            )

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.layers[0].values()
            h = torch.tanh(x)
            y = gate(h)
            change(h)
            return y + up(h)

    model, x = Net(), torch.randn(4, 32)
    backend = fp4graph.backend("all", inner="eager", activations="same")
    out = torch.compile(model, backend=backend)(x)
    h, rounded = torch.tanh(x), fp4graph.NVFP4.fake_quantize
    gate, up = (fp4graph.quantize(each.weight).dequantize() for each in model.layers[0].values())
    expected = linear(rounded(h), gate)
    change(h)
    assert relative_l2(out, expected + linear(rounded(h), up)) < 1e-6


@pytest.mark.parametrize("where", ["weight", "view", "alias"])
@torch.no_grad()
def test_a_weight_that_forward_changes_is_refused(where: str) -> None:
    class Clamps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(32, 32)])

        def forward(self, x: Tensor) -> Tensor:
            weight = self.layers[0].weight
            target = {"weight": weight, "view": weight[:4], "alias": weight.detach()}[where]
            target.clamp_(-0.1, 0.1)
            return self.layers[0](x)

    call = torch.compile(Clamps(), backend=fp4graph.backend("other", inner="eager"))
    with pytest.raises(RefusalError, match="the graph changes its weight in place"):
        call(torch.randn(2, 32))
