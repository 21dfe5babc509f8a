"""SmoothQuant: the factor, its way into norms, and what it is for."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.calibration import BATCHES, TEST, logits
from support.closer import relative_l2
from support.models import tiny
from support.recorder import Recorder

import fp4graph
from fp4graph.errors import CalibrationError, OptionError, RefusalError
from fp4graph.passes.pipeline import plan_passes, rewrite_passes
from fp4graph.passes.tag import TagLinears
from fp4graph.policy import Policy
from fp4graph.quantizers import Quantizer, Transform, smoothing
from fp4graph.scheme import Scheme

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fp4graph import Calibration


def outlying(family: str) -> nn.Module:
    """Return a tiny model, some of whose norms' channels are large, as trained models' are."""
    model = tiny(family).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ("norm" in name or ".ln_" in name) and len(parameter) == 64:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter[5], parameter[40] = 12.0, -20.0
    return model


def with_weights_of(model: nn.Module, found: Calibration) -> nn.Module:
    twin = copy.deepcopy(model)
    for fqn in found.packed:
        module, w = twin.get_submodule(fqn), found.dequantize(fqn)
        module.weight.copy_(w.T if type(module).__name__ == "Conv1D" else w)
    return twin


def test_the_factor() -> None:
    amax, w = torch.tensor([8.0, 2.0, 0.0, 1.0]), torch.tensor([[1.0, -4, 1, 0], [-2, 1, 1, 0]])
    s = smoothing(amax, [w, w / 8], 0.5)
    assert s.tolist() == pytest.approx([(8 / 2) ** 0.5, (2 / 4) ** 0.5, 1, 1])
    even = smoothing(amax, [w], 1.0)
    assert (amax / even).tolist() == pytest.approx([1, 1, 0, 1]), "inputs have one range"


@pytest.mark.parametrize("transform", [Transform(16), Transform(0, torch.rand(32) + 0.1)])
def test_a_transform_leaves_products_as_they_are(transform: Transform) -> None:
    w, x = torch.randn(7, 32), torch.randn(50, 32)
    turned = transform.apply(torch.eye(32)).inverse() @ x.T
    assert relative_l2(transform.apply(w) @ turned, w @ x.T) < 1e-5
    assert relative_l2(transform.undo(transform.apply(w)), w) < 1e-6
    assert relative_l2(transform.of_hessian(x.T @ x), turned @ turned.T) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("quantizer", ["rtn+smooth", "gptq:scale-search+smooth0.5"])
def test_equals_the_weights_that_the_codes_stand_for(
    family: str, quantizer: str, tmp_path: Path
) -> None:
    model = outlying(family)
    found = fp4graph.calibrate(model, BATCHES, quantizer=quantizer, out=tmp_path / "c.safetensors")
    smoothed = {fqn.rpartition(".")[2] for fqn in found.smooth}
    expected = {"llama": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}}
    assert smoothed == expected.get(family, smoothed)
    assert smoothed
    expected_logits = logits(with_weights_of(model, found))
    assert relative_l2(expected_logits, logits(model)) > 1e-3
    for given in (found, tmp_path / "c.safetensors"):
        torch._dynamo.reset()
        backend = fp4graph.backend(calibration=given, inner="eager")
        assert relative_l2(logits(torch.compile(model, backend=backend)), expected_logits) < 2e-6
        assert f"W4A16, {quantizer}" in backend.report.selected[0].reason


def operations(model: nn.Module, select: str, found: Calibration) -> Recorder:
    torch._dynamo.reset()
    policy = Policy.of(select, Scheme.of("nvfp4", calibration=found))
    recorder = Recorder(TagLinears(), *plan_passes(policy, "raise"), *rewrite_passes())
    with torch.no_grad():
        torch.compile(model, backend=recorder)(TEST, use_cache=False)
    return recorder


def test_divides_in_the_norm_where_nobody_else_listens() -> None:
    model = outlying("llama")
    found = fp4graph.calibrate(model, BATCHES, quantizer="rtn+smooth")
    plain = fp4graph.calibrate(model, BATCHES, quantizer="weighted-scale-search")
    muls = {
        select: operations(model, select, found).after["mul"]
        - operations(model, select, plain).after["mul"]
        for select in ("all", "q")
    }
    assert muls == {"all": 2 * 2, "q": 2}, "one a norm's weight; one for q alone, k and v are dense"
    torch._dynamo.reset()
    alone = torch.compile(model, backend=fp4graph.backend("q", calibration=found, inner="eager"))
    twin = copy.deepcopy(model)
    for block in (0, 1):
        fqn = f"model.layers.{block}.self_attn.q_proj"
        twin.get_submodule(fqn).weight.copy_(found.dequantize(fqn))
    assert relative_l2(logits(alone), logits(twin)) < 2e-6


def test_follows_the_norms_weight() -> None:
    model = outlying("llama")
    found = fp4graph.calibrate(model, BATCHES, quantizer="rtn+smooth")
    compiled = torch.compile(model, backend=fp4graph.backend(calibration=found, inner="eager"))
    logits(compiled)
    model.model.layers[0].input_layernorm.weight *= 1.5
    assert relative_l2(logits(compiled), logits(with_weights_of(model, found))) < 2e-6


def test_makes_rounded_activations_better() -> None:
    model = outlying("llama")
    errors = {}
    for quantizer in ("weighted-scale-search", "weighted-scale-search+smooth"):
        torch._dynamo.reset()
        found = fp4graph.calibrate(model, BATCHES, quantizer=quantizer)
        backend = fp4graph.backend(calibration=found, activations="same", inner="eager")
        errors[quantizer] = relative_l2(
            logits(torch.compile(model, backend=backend)), logits(model)
        )
    plain, smoothed = errors.values()
    assert smoothed < 0.9 * plain


def test_what_does_not_fit() -> None:
    parse = Quantizer.parse
    assert parse("rtn+smooth", fp4graph.NVFP4) == Quantizer("rtn", "rtn", 0, 0.6, "")
    assert parse("gptq:scale-search+smooth.25", fp4graph.MXFP4).strength == 0.25
    for bad in ("rtn+smooth2", "rtn@16+smooth", "rtn+smoother", "+smooth"):
        with pytest.raises(OptionError, match=r"unknown quantizer .* \+smooth0.5 for SmoothQuant"):
            parse(bad, fp4graph.NVFP4)
    with pytest.raises(OptionError, match="mr-gptq rotates"):
        parse("mr-gptq+smooth", fp4graph.NVFP4)
    with pytest.raises(OptionError, match="needs data"):
        fp4graph.backend(quantizer="rtn+smooth")
    gpt2 = tiny("gpt2")
    with pytest.raises(CalibrationError, match="it is fused: select all of q,k,v"):
        fp4graph.calibrate(gpt2, BATCHES, "v", quantizer="rtn+smooth")
    found = fp4graph.calibrate(gpt2, BATCHES, quantizer="rtn+smooth")
    part = torch.compile(gpt2, backend=fp4graph.backend("v", calibration=found))
    with pytest.raises(RefusalError, match="its quantizer changes all its input"):
        logits(part)
