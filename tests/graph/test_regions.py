"""Bodies of higher-order ops: found, tagged for each call, rewritten, with any inner compiler."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.closer import relative_l2
from torch import nn
from torch.utils.checkpoint import checkpoint

import fp4graph
from fp4graph import RefusalError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

INNER = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict(
            {"up_proj": nn.Linear(32, 48), "down_proj": nn.Linear(48, 32, bias=False)}
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](x)))


region = torch.compiler.nested_compile_region(lambda layer, x: layer(x))
CALLS: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "checkpoint": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "nested region": lambda layer, x: region(layer, x),
    "cond": lambda layer, x: torch.cond(x.sum() > 0, layer, lambda y: layer(-y), (x,)),
    "checkpoint of a region": lambda layer, x: checkpoint(
        lambda y: region(layer, y), x, use_reentrant=False
    ),
}


class Net(nn.Module):
    def __init__(self, call: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = CALLS[self.call](layer, x)
        return x


def twin(model: Net, *picked: str) -> Callable[[Tensor], Tensor]:
    """Copy the model, its picked weights rounded; its layers run as they are."""
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and any(each in name for each in picked):
            weight.data = fp4graph.quantize(weight.data).dequantize()

    def run(x: Tensor) -> Tensor:
        for layer in model.layers:
            x = layer(x if model.call != "cond" or x.sum() > 0 else -x)
        return x

    return run


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_rewritten_in_each_call_by_itself(call: str, inner: str) -> None:
    torch.manual_seed(0)
    model, x = Net(call), torch.randn(4, 32)
    report = fp4graph.Report()
    backend = fp4graph.backend("blocks=1 | down", inner=inner, report=report)
    out = torch.compile(model, backend=backend)(x)
    assert {row.path for row in report.selected} == {
        "layers.1.mlp.up_proj", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj",
        "layers.2.mlp.down_proj",
    }  # fmt: skip
    assert len(report) == 6
    assert relative_l2(out, twin(model, "layers.1.", "down_proj")(x)) < 1e-6


@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_none_is_bit_identical(call: str) -> None:
    model, x = Net(call), torch.randn(4, 32)
    out = torch.compile(model, backend=fp4graph.backend("none", inner="eager"))(x)
    torch._dynamo.reset()
    assert torch.equal(out, torch.compile(model, backend="eager")(x))


@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_a_traced_model_is_rewritten_from_its_first_form_each_time(call: str) -> None:
    model, x = Net(call), torch.randn(4, 32)
    traced = fp4graph.TracedModel(model)
    plain = traced(x)
    for select in ("down", "blocks=0"):
        traced.select(fp4graph.Policy.of(select, fp4graph.Scheme.of()))
        expected = twin(model, "down_proj" if select == "down" else "layers.0.")(x)
        assert relative_l2(traced(x), expected) < 1e-6
    traced.select(None)
    assert torch.equal(traced(x), plain)


@torch.no_grad()
def test_an_op_that_is_not_known_is_refused_by_name() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            step = lambda carry, y: (self.layers[0](carry), y.clone())  # noqa: E731
            return torch._higher_order_ops.scan(step, x, x[None].clone())[0]

    model, x = Loop(), torch.randn(2, 8)
    with pytest.raises(RefusalError, match=r"layers\.0: it is inside scan, a higher-order op"):
        torch.compile(model, backend=fp4graph.backend("other", inner="eager"))(x)
    torch._dynamo.reset()
    kept = fp4graph.backend("other", inner="eager", on_refusal="keep")
    assert torch.allclose(torch.compile(model, backend=kept)(x), model.layers[0](x))
    assert not kept.report.selected
