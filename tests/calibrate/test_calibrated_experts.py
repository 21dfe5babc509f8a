"""Experts calibrated one by one, in every layout that they are stored and called in."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.calibration import BATCHES, logits
from support.closer import relative_l2
from support.experts import MODELS, Indexed

import fp4graph
from fp4graph.errors import CalibrationError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

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
    gone = fp4graph.calibrate(model, BATCHES, "expert", format="mxfp4", quantizer="learned")
    assert sum(e for _, e in gone.about["output_error"].values()) < sum(
        n for n, _ in errors.values()
    )


def test_what_does_not_fit() -> None:
    class Model(Indexed):
        def forward(self, x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
            return super().forward(x, which)

    batches = [{"x": torch.randn(5, 40), "which": torch.tensor(1)}]
    with pytest.raises(CalibrationError):
        fp4graph.calibrate(Model(), batches, "path:up", quantizer="gptq")
    model = MODELS["mixtral"]()
    found = fp4graph.calibrate(model, BATCHES, "expert:down", quantizer="gptq")
    backend = fp4graph.backend("expert", calibration=found)
    with pytest.raises(fp4graph.RefusalError, match=r"no codes for .*gate_up_proj\[0\]"):
        logits(torch.compile(model, backend=backend))
