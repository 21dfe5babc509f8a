"""FP8: against torch's and ml_dtypes' own casts, and through the whole of the library."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import tiny, tokens

import fp4graph
from fp4graph.errors import OptionError, WeightError
from fp4graph.formats import FP8, get_format
from fp4graph.scheme import Scheme


def test_the_layout() -> None:
    w = torch.randn(5, 37)
    packed = fp4graph.quantize(w, "fp8")
    assert get_format("fp8") is FP8
    assert packed.qdata.shape == (5, 37)
    assert packed.qdata.dtype == torch.uint8
    assert packed.scale.shape == (5, 1)
    assert packed.scale.dtype == torch.float32
    assert packed.per_tensor_scale is None
    assert packed.nbytes == FP8.packed_bytes(5, 37) == 5 * 37 + 5 * 4


@given(st.integers(1, 9), st.integers(1, 70), st.integers(-60, 60), st.integers(0, 2**32))
def test_codes_are_those_of_torch_and_of_ml_dtypes(n: int, k: int, power: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * 2.0**power
    packed = FP8.quantize(w)
    scaled = w * (1 / packed.scale)
    assert torch.equal(packed.qdata, scaled.to(torch.float8_e4m3fn).view(torch.uint8))
    assert np.array_equal(packed.qdata, scaled.numpy().astype(ml_dtypes.float8_e4m3fn).view("u1"))
    assert torch.equal(packed.scale, w.abs().amax(1, keepdim=True) / 448)
    values = packed.qdata.view(torch.float8_e4m3fn).float() * packed.scale
    assert torch.equal(packed.dequantize(), values)


def test_largest_values_are_kept_and_zeros_stay() -> None:
    w = torch.randn(4, 64)
    w[2] = 0
    packed = FP8.quantize(w)
    largest = w.abs().argmax(1)
    assert torch.allclose(packed.dequantize()[range(4), largest], w[range(4), largest], rtol=1e-6)
    assert not packed.dequantize()[2].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    w = torch.randn(4, 8)
    w[1, 3] = value
    with pytest.raises(WeightError, match="1 of 32 values"):
        FP8.quantize(w)


def test_activations_have_a_scale_a_token() -> None:
    x = torch.randn(2, 3, 40) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    scale = x.abs().amax(-1, keepdim=True) / 448
    codes = (x * (1 / scale)).to(torch.float8_e4m3fn)
    assert torch.equal(FP8.fake_quantize(x), codes.float() * scale)
    x[0, 1, 5] = torch.nan
    rounded = FP8.fake_quantize(x)
    assert rounded[0, 1].isnan().all()
    assert rounded.isnan().sum() == 40


def test_a_scheme_says_eight_bits() -> None:
    assert str(Scheme.of("fp8")) == "fp8 W8A16"
    assert str(Scheme.of("fp8", activations="same")) == "fp8 W8A8"


@pytest.mark.parametrize("quantizer", ["scale-search", "four-over-six", "mr-gptq", "learned"])
def test_quantizers_of_fp4_are_refused(quantizer: str) -> None:
    with pytest.raises(OptionError, match="fp8 has rtn and gptq"):
        Scheme.read("fp8", quantizer, None, "auto")


def test_bits_are_4_and_8() -> None:
    assert [get_format(each).bits for each in ("nvfp4", "mxfp4", "fp8")] == [4, 4, 8]


@pytest.mark.parametrize("activations", [None, "same"])
def test_a_model_runs_in_it(activations: str | None) -> None:
    model = tiny("llama").requires_grad_(False)
    with torch.no_grad():
        dense = model(tokens()).logits
        options = {"format": "fp8", "activations": activations, "inner": "eager"}
        compiled = torch.compile(model, backend=fp4graph.backend("all", **options))
        rewritten = compiled(tokens()).logits
        fp4graph.convert(model, "all", format="fp8", activations=activations)
        converted = model(tokens()).logits
    error = (rewritten - dense).norm() / dense.norm()
    assert 0.001 < error < 0.15
    assert (rewritten - converted).norm() / dense.norm() < 1e-6
