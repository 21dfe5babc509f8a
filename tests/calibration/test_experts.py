"""Experts calibrated one by one, in every layout that they are stored and called in."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.calibration import BATCHES, logits
from support.closer import relative_l2
from support.experts import MODELS, E, Indexed, K
from torch import Tensor, nn

import fp4graph
from fp4graph.errors import CalibrationError

if TYPE_CHECKING:
    from pathlib import Path

    from fp4graph import Calibration


@torch.no_grad()
def with_codes(model: nn.Module, found: Calibration) -> nn.Module:
    twin = copy.deepcopy(model)
    parameters = dict(twin.named_parameters())
    for name in found.packed:
        path, _, expert = name.removesuffix("]").partition("[")
        w = parameters[path][int(expert)] if expert else parameters[f"{path}.weight"]
        values = found.dequantize(name)
        w.copy_(values if w.shape == values.shape else values.T)
    return twin


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("quantizer", ["gptq:scale-search", "mr-gptq"])
def test_the_backend_runs_what_was_found(family: str, quantizer: str, tmp_path: Path) -> None:
    model = MODELS[family]().requires_grad_(False)
    file = tmp_path / "c.safetensors"
    found = fp4graph.calibrate(model, BATCHES, "all,expert", quantizer=quantizer, out=file)
    experts = [name for name in found.packed if name.endswith("]")]
    assert len(experts) == 2 * 2 * 4, "two blocks, gate_up and down, four experts"
    expected = logits(with_codes(model, found))
    torch._dynamo.reset()
    backend = fp4graph.backend("all,expert", calibration=file, inner="eager")
    assert relative_l2(logits(torch.compile(model, backend=backend)), expected) < 5e-6
    assert relative_l2(expected, logits(model)) > 1e-3


@pytest.mark.parametrize("family", MODELS)
def test_each_is_fitted_to_its_own_tokens(family: str) -> None:
    model = MODELS[family]().requires_grad_(False)
    found = fp4graph.calibrate(model, BATCHES, "expert", format="mxfp4", quantizer="gptq")
    errors = found.about["output_error"]
    assert len(errors) == 16
    better = [ours < nearest for nearest, ours in errors.values()]
    assert sum(better) >= 15, "each on what its router sent it"


def test_experts_learn() -> None:
    model = MODELS["mixtral"]().requires_grad_(False)
    found = fp4graph.calibrate(model, BATCHES, "expert", format="mxfp4", quantizer="learned")
    nearest, ours = zip(*found.about["output_error"].values(), strict=True)
    assert sum(ours) < 0.8 * sum(nearest)


class Looped(nn.Module):
    """Blocks that call their experts one after the other, by number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Indexed() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + sum(layer(x, expert) for expert in range(E)) / 100
        return x


class Chosen(Looped):
    """Which expert it is, is in the input."""

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, which) / 100
        return x


def test_experts_by_number() -> None:
    torch.manual_seed(0)
    model, x = Looped().requires_grad_(False), torch.randn(20, K)
    select = "expert"
    found = fp4graph.calibrate(model, [{"x": x}], select, quantizer="gptq")
    assert len(found.packed) == 2 * 2 * E
    assert all(ours < nearest for nearest, ours in found.about["output_error"].values())
    expected = with_codes(model, found)(x)
    torch._dynamo.reset()
    backend = fp4graph.backend(select, calibration=found, inner="eager")
    with torch.no_grad():
        assert relative_l2(torch.compile(model, backend=backend)(x), expected) < 5e-6


def test_what_does_not_fit() -> None:
    batches = [{"x": torch.randn(5, K), "which": torch.tensor(1)}]
    with pytest.raises(CalibrationError, match=r"which expert it is comes out while"):
        fp4graph.calibrate(Chosen(), batches, "expert", quantizer="gptq")
    model = MODELS["mixtral"]()
    found = fp4graph.calibrate(model, BATCHES, "expert:down", quantizer="gptq")
    backend = fp4graph.backend("expert", calibration=found)
    with pytest.raises(fp4graph.RefusalError, match=r"no codes for .*gate_up_proj\[0\]"):
        logits(torch.compile(model, backend=backend))
