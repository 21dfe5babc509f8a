"""Learned rounding: it begins at given codes, keeps their scales, and errs less."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.closer import relative_l2
from support.models import tiny, tokens

import fp4graph
from fp4graph.formats import get_format
from fp4graph.quantizers import gptq, learn, scale_search
from fp4graph.quantizers.latents import Latents

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

FORMATS = ["nvfp4", "mxfp4"]


def case(format: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight, [24, 80], and inputs whose columns go together, [256, 80]."""
    torch.manual_seed(seed)
    weight = torch.randn(24, 80)
    weight[3], weight[:, 64:] = 0.0, 0.0  # a row, and whole groups of columns
    return weight, torch.randn(256, 80) @ torch.randn(80, 80)


@pytest.mark.parametrize("format", FORMATS)
def test_begins_at_the_codes_that_it_is_given(format: str) -> None:
    weight, x = case(format)
    for base in (
        fp4graph.quantize(weight, format),
        scale_search(weight, get_format(format)),
        gptq(weight, x.T @ x / len(x), fp4graph.quantize(weight, format)),
    ):
        for reach, inside in ((0.49, True), (0.42, False)):
            latents = Latents(weight, base, reach, inside=inside)
            assert torch.equal(latents.packed().dequantize(), base.dequantize())
            assert torch.equal(latents.rounded(), base.dequantize())


@pytest.mark.parametrize("format", FORMATS)
def test_errs_less_than_what_it_begins_with(format: str) -> None:
    weight, x = case(format)
    y = x @ weight.T

    def error(weights: Mapping[str, Tensor], batch: int) -> Tensor:
        rows = slice(64 * batch, 64 * batch + 64)
        return (x[rows] @ weights["w"].T - y[rows]).square().mean()

    nearest = fp4graph.quantize(weight, format)
    best = gptq(weight, x.T @ x / len(x), nearest)
    for base in (nearest, best):
        found = learn({"w": weight}, {"w": base}, error, batches=4)["w"]
        before, after = (
            float((x @ each.dequantize().T - y).square().mean()) for each in (base, found)
        )
        assert after < 0.95 * before if base is nearest else after <= before
        assert torch.equal(found.scale.view(torch.uint8), base.scale.view(torch.uint8))
        assert found.per_tensor_scale is base.per_tensor_scale


def test_what_is_no_better_is_not_taken() -> None:
    weight, _ = case("nvfp4")
    base = fp4graph.quantize(weight)
    away = base.dequantize() + 1

    def error(weights: Mapping[str, Tensor], batch: int) -> Tensor:
        change = weights["w"] - base.dequantize()
        return (
            change.square().sum()
            if not weights["w"].requires_grad
            else (weights["w"] - away).square().sum()
        )

    assert learn({"w": weight}, {"w": base}, error, batches=1)["w"] is base


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rotation", ["", pytest.param("@16", marks=pytest.mark.slow)])
def test_a_model_errs_less_than_with_gptq(family: str, rotation: str) -> None:
    model = tiny(family)
    batches = [tokens(48, batch=2, seed=seed) for seed in range(8)]
    test = tokens(48, batch=4, seed=99)

    def distance(quantizer: str) -> float:
        calibration = fp4graph.calibrate(model, batches, format="mxfp4", quantizer=quantizer)
        torch._dynamo.reset()
        backend = fp4graph.backend(
            format="mxfp4", quantizer=quantizer, calibration=calibration, inner="eager"
        )
        compiled = torch.compile(copy.deepcopy(model), backend=backend)
        with torch.no_grad():
            out, dense = (m(test, use_cache=False).logits for m in (compiled, model))
        return relative_l2(out, dense)

    assert distance(f"learned{rotation}") < distance(f"gptq{rotation}")
