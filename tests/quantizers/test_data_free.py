"""Quantizers that need no data: never worse than what they contain, and the best there is."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny, tokens
from support.trials import plan as plan_of

import fp4graph
from fp4graph import OptionError, WeightError
from fp4graph.formats import FORMATS, PackedWeight, get_format
from fp4graph.formats.minifloat import E4M3
from fp4graph.quantizers import DATA_FREE, candidates
from fp4graph.quantizers.candidates import best_scales

WEIGHTS = {
    "normal": lambda n, k: torch.randn(n, k),
    "laplace": lambda n, k: torch.distributions.Laplace(0.0, 1.0).sample((n, k)),
    "outliers": lambda n, k: torch.randn(n, k) * torch.where(torch.rand(n, k) < 0.01, 30.0, 1.0),
    "columns of every size": lambda n, k: torch.randn(n, k) * torch.logspace(-9, 3, k),
    "zeros": lambda n, k: torch.randn(n, k) * (torch.arange(k) % 40 < 3),
}


def error(weight: torch.Tensor, format: str, quantizer: str) -> torch.Tensor:
    packed = fp4graph.quantize(weight, format, quantizer)
    return (packed.dequantize(torch.float64) - weight.double()).square().sum()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_four_over_six_lies_between(kind: str) -> None:
    torch.manual_seed(0)
    weight = WEIGHTS[kind](64, 320)
    rtn, four, best = (
        error(weight, "nvfp4", each) for each in ("rtn", "four-over-six", "scale-search")
    )
    assert best <= four <= rtn
    if kind in ("normal", "laplace"):  # 12 to 16 % and 21 to 27 % in reference tables
        assert four < 0.9 * rtn
        assert best < 0.82 * rtn


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_paper_s_search_and_its_code_s(kind: str) -> None:
    torch.manual_seed(0)
    weight = WEIGHTS[kind](64, 320)
    rtn, alternating, best = (
        error(weight, "nvfp4", each) for each in ("rtn", "alternating-search", "scale-search")
    )
    assert alternating <= rtn
    assert alternating < 1.05 * best, "which tries two scales of the tensor"
    nvfp4 = get_format("nvfp4")
    groups, amax = nvfp4.groups(weight)
    first, tensor = nvfp4.scale_codec.encode(amax)
    below = [(first.to(torch.int16) - step).clamp(min=1).to(torch.uint8) for step in range(19)]
    _, errors = best_scales(groups, below, tensor, nvfp4, power=2.4)
    change = fp4graph.quantize(weight, "nvfp4", "grid-search").dequantize() - weight
    assert float(change.abs().pow(2.4).sum()) == pytest.approx(float(errors.sum()), rel=2e-3)
    assert error(weight, "nvfp4", "grid-search") >= best


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("format", ["mxfp4", "mxfp4:even", "mxfp4:rceil"])
def test_search_among_powers_of_two_is_no_worse_than_any_rule(kind: str, format: str) -> None:
    torch.manual_seed(0)
    weight = WEIGHTS[kind](64, 320)
    assert error(weight, format, "scale-search") <= error(weight, format, "rtn")


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_window_holds_the_best_of_all_scales(kind: str) -> None:
    torch.manual_seed(1)
    weight = WEIGHTS[kind](24, 128)
    nvfp4 = get_format("nvfp4")
    groups, amax = nvfp4.groups(weight)
    least = []
    for largest in (E4M3.max, 256.0):
        _, tensor = nvfp4.scale_codec.encode(amax, largest)
        every = [torch.full(amax.shape, code, dtype=torch.uint8) for code in range(1, 127)]
        _, errors = best_scales(groups, every, tensor, nvfp4)
        least.append(float(errors.double().sum()))
    assert float(error(weight, "nvfp4", "scale-search")) == pytest.approx(min(least), rel=1e-6)
    mxfp4 = get_format("mxfp4")
    groups, amax = mxfp4.groups(weight)
    every = [torch.full(amax.shape, code, dtype=torch.uint8) for code in range(255)]
    _, errors = best_scales(groups, every, None, mxfp4)
    found = float(error(weight, "mxfp4", "scale-search"))
    assert found == pytest.approx(float(errors.double().sum()), rel=1e-6)


@pytest.mark.parametrize("quantizer", DATA_FREE)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_odd_shapes_and_dtypes(quantizer: str, name: str, dtype: torch.dtype) -> None:
    known = {"mxfp4": ("rtn", "scale-search"), "fp8": ("rtn",)}
    if quantizer not in known.get(name, DATA_FREE):
        with pytest.raises(OptionError, match=f"quantizer '{quantizer}' is for"):
            fp4graph.quantize(torch.zeros(1, 1), name, quantizer)
        return
    for shape in ((1, 1), (3, 33), (0, 16), (2, 0)):
        packed = fp4graph.quantize(torch.randn(shape).to(dtype), name, quantizer)
        assert isinstance(packed, PackedWeight)
        assert packed.dequantize().shape == shape
    zero = fp4graph.quantize(torch.zeros(2, 64, dtype=dtype), name, quantizer)
    assert torch.equal(zero.dequantize(), torch.zeros(2, 64))
    with pytest.raises(WeightError, match="1 of 4 values are NaN or Inf"):
        fp4graph.quantize(torch.tensor([[1.0, torch.nan], [2, 3]], dtype=dtype), name, quantizer)


def test_slabs_are_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 160)
    whole = fp4graph.quantize(weight, "nvfp4", "scale-search")
    monkeypatch.setattr(candidates, "_SLAB_VALUES", 7 * 160)
    parts = fp4graph.quantize(weight, "nvfp4", "scale-search")
    assert torch.equal(whole.qdata, parts.qdata)
    assert torch.equal(whole.scale.view(torch.uint8), parts.scale.view(torch.uint8))


@torch.no_grad()
def test_a_backend_runs_what_the_mapping_says() -> None:
    model = tiny("llama")
    select = {"all": {"quantizer": "four-over-six"}, "down": {"quantizer": "scale-search"}, "v": {}}
    backend = fp4graph.backend(select, inner="eager")
    out = torch.compile(model, backend=backend)(tokens(), use_cache=False).logits
    reasons = {row.role: row.reason for row in backend.report}
    assert reasons["q"].endswith("nvfp4 W4A16, four-over-six")
    assert reasons["down"].endswith("nvfp4 W4A16, scale-search")
    twin = tiny("llama")
    for name, parameter in twin.named_parameters():
        role = next((row.role for row in backend.report if f"{row.path}.weight" == name), None)
        quantizer = {"down": "scale-search", "v": "rtn"}.get(role or "", "four-over-six")
        if role not in (None, "lm_head"):
            packed = fp4graph.quantize(parameter, "nvfp4", quantizer)
            parameter.copy_(packed.dequantize())
    expected = twin(tokens(), use_cache=False).logits
    assert (out - expected).norm() < 1e-5 * expected.norm()


def test_unknown_quantizer() -> None:
    with pytest.raises(OptionError, match="quantizers are rtn, four-over-six, alternating-search"):
        fp4graph.backend(quantizer="magic")
    with pytest.raises(OptionError, match="is for nvfp4"):
        fp4graph.backend(format="mxfp4", quantizer="four-over-six")
    with pytest.raises(OptionError, match=r"is for nvfp4"):
        fp4graph.calibrate(tiny("llama"), [], format="mxfp4", quantizer="gptq:four-over-six")


def test_trials_have_quantizers() -> None:
    plan = plan_of("q", quantizers=["rtn", "scale-search"])
    assert [trial.facts["quantizer"] for trial in plan[1:]] == ["rtn", "scale-search"]
    assert str(plan[2]) == "only q in nvfp4 W4A16, scale-search"
    with pytest.raises(OptionError, match="is for nvfp4"):
        plan_of("q", formats=["nvfp4", "mxfp4"], quantizers=["four-over-six"])
