"""GPTQ against an independent dense implementation in float64, and where its Hessian is bad."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4graph.errors import CalibrationError
from fp4graph.formats import FP8, MXFP4, NVFP4, BlockFormat, PackedWeight
from fp4graph.quantizers import GRIDS, Hessian, Quantizer, gptq, output_error

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def under_scales(quantizer: str, w: Tensor, format: BlockFormat, h: Tensor) -> PackedWeight:
    return GRIDS[Quantizer.parse(quantizer, format).grid](w, format, h.diagonal())


def nearest(x: np.ndarray) -> np.ndarray:
    """Round to E2M1, ties to even codes."""
    magnitude = np.abs(x).clip(max=6)
    distance = np.abs(magnitude[..., None] - VALUES)
    least = distance.min(-1, keepdims=True)
    tied = distance == least
    even = np.arange(8) % 2 == 0
    code = np.where(tied & even, 1.5, tied.astype(float)).argmax(-1)
    return np.sign(x) * VALUES[code]


def reference(w: Tensor, base: PackedWeight, h: Tensor, damping: float) -> np.ndarray:
    """Do what GPTQ means, column by column with a fresh inverse of what is left each time."""
    ones = torch.ones_like(base.qdata) * 0x22  # 1.0 everywhere
    unit = PackedWeight(ones, base.scale, base.per_tensor_scale, base.shape, base.format)
    step = unit.dequantize(torch.float64).numpy()
    weight, hessian = w.double().numpy().copy(), h.double().numpy().copy()
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    left = list(np.argsort(-np.diag(h.numpy()), kind="stable"))
    rounded = np.zeros_like(weight)
    while left:
        column = left[0]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        rounded[:, column] = nearest(weight[:, column] / step[:, column]) * step[:, column]
        error = weight[:, column] - rounded[:, column]
        weight[:, left] -= np.outer(error / inverse[0, 0], inverse[0])
        left.pop(0)
    return rounded


def problem(n: int = 24, k: int = 80, tokens: int = 300) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    mix = torch.randn(k, k, dtype=torch.float64) * 0.3 + torch.eye(k)
    x = torch.randn(tokens, k, dtype=torch.float64) @ mix
    return torch.randn(n, k) * 0.1, x.T @ x / tokens


@pytest.mark.parametrize("format", [NVFP4, MXFP4], ids=str)
@pytest.mark.parametrize("quantizer", ["gptq", "gptq:scale-search"])
@pytest.mark.parametrize("shape", [(24, 80), (5, 200), (16, 37)], ids=str)
def test_agrees_with_the_dense_implementation(
    format: BlockFormat, quantizer: str, shape: tuple[int, int]
) -> None:
    w, h = problem(*shape)
    base = under_scales(quantizer, w, format, h)
    packed = gptq(w, h, base)
    assert torch.equal(packed.scale.view(torch.uint8), base.scale.view(torch.uint8))
    expected = reference(w, base, h, 0.01)
    # every code: neighbouring values are further apart than this
    assert np.abs(packed.dequantize(torch.float64).numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("format", [NVFP4, MXFP4], ids=str)
@pytest.mark.parametrize("quantizer", ["gptq", "gptq:scale-search", "gptq:weighted-scale-search"])
def test_the_output_errs_less_than_with_rounding_to_nearest(
    format: BlockFormat, quantizer: str
) -> None:
    w, h = problem(64, 256, 2000)
    base = under_scales(quantizer, w, format, h)
    rounded = gptq(w, h.float(), base).dequantize()
    assert output_error(w, rounded, h) < 0.7 * output_error(w, base.dequantize(), h)


@pytest.mark.parametrize("format", [NVFP4, MXFP4], ids=str)
def test_weighted_scales_err_less_where_inputs_are_large(format: BlockFormat) -> None:
    torch.manual_seed(0)
    w, power = torch.randn(32, 80), torch.rand(80) ** 4 * 100
    weighted = under_scales("weighted-scale-search", w, format, power.diag()).dequantize()
    plain = under_scales("scale-search", w, format, power.diag()).dequantize()
    error = [float(((each - w) ** 2 * power).sum()) for each in (weighted, plain)]
    assert error[0] < 0.99 * error[1]
    alike = under_scales("weighted-scale-search", w, format, torch.full((80,), 3.0).diag())
    assert torch.equal(alike.dequantize(), plain), "with equal weights it is the plain search"


def test_the_hessian_is_the_mean_over_tokens() -> None:
    torch.manual_seed(0)
    batches = torch.randn(3, 4, 5, 8)
    hessian = Hessian(8)
    for batch in batches:
        hessian.add(batch)
    x = batches.reshape(-1, 8)
    assert hessian.tokens == 60
    assert torch.allclose(hessian.mean, x.T @ x / 60, atol=1e-5)


def test_an_input_that_is_never_used_is_rounded_to_nearest() -> None:
    w, h = problem()
    h[7], h[:, 7] = 0, 0
    packed = gptq(w, h, NVFP4.quantize(w))
    assert torch.equal(packed.dequantize()[:, 7], NVFP4.quantize(w).dequantize()[:, 7])


def test_a_hessian_without_a_factor_gets_more_damping_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    w, h = problem()
    h = h - 0.05 * h.diagonal().mean() * torch.eye(len(h))  # no longer positive
    with caplog.at_level(logging.WARNING, logger="fp4graph"):
        packed = gptq(w, h, NVFP4.quantize(w), name="layers.0.q_proj")
    said = "layers.0.q_proj: its Hessian has no Cholesky factor: damping raised to 0.1"
    assert said in caplog.text
    assert not torch.equal(packed.qdata, NVFP4.quantize(w).qdata), "it is not rounding to nearest"
    with pytest.raises(CalibrationError, match=r"layers\.0\.q_proj: its Hessian has no inverse"):
        gptq(w, -h, NVFP4.quantize(w), name="layers.0.q_proj")


def test_inputs_that_are_no_numbers() -> None:
    w, h = problem()
    with pytest.raises(CalibrationError, match="NaN or Inf while calibrating"):
        gptq(w, h * torch.nan, NVFP4.quantize(w))


def test_fp8_has_less_error_than_to_nearest() -> None:
    w, h = problem()
    base = FP8.quantize(w)
    found = gptq(w, h, base)
    assert torch.equal(found.scale, base.scale)
    nearest = output_error(w.double(), base.dequantize().double(), h)
    assert output_error(w.double(), found.dequantize().double(), h) < 0.8 * nearest
