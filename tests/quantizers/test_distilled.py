"""Block-wise distillation: unseen windows decide, norms are trained with the codes, W4A4 counts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.calibration import BATCHES, logits
from support.closer import relative_l2
from support.models import tiny, tokens

import fp4graph
from fp4graph.formats import FP8, MXFP4, MXFP4_FITTED, NVFP4
from fp4graph.quantizers import Quantizer, distill, scale_search
from fp4graph.quantizers.distilled import held_out

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from fp4graph.quantizers.distilled import Factors

WINDOWS = 80


class Layer:
    """A norm's weight and a linear, on windows of 64 tokens; remembers who was trained on."""

    def __init__(self, norm: Tensor) -> None:
        torch.manual_seed(0)
        self.weight = torch.randn(24, 64)
        mix = torch.randn(64, 64)
        self.x = [torch.randn(64, 64) @ mix for _ in range(WINDOWS)]
        self.y = [x * norm @ self.weight.T for x in self.x]
        self.base = scale_search(self.weight, NVFP4)
        self.trained: list[int] = []

    def error(self, weights: Mapping[str, Tensor], factors: Factors, batch: int) -> Tensor:
        if torch.is_grad_enabled():
            self.trained.append(batch)
        x = self.x[batch] * factors.get("norm", torch.ones(64))
        return (x @ weights["w"].T - self.y[batch]).square().mean()

    def distilled(self, norms: Mapping[Any, int]) -> tuple[float, float, Factors]:
        """Return the error on windows that were held out before and after, and the factors."""
        found = distill({"w": self.weight}, {"w": self.base}, norms, self.error, WINDOWS)
        held = range(WINDOWS - held_out(WINDOWS), WINDOWS)
        with torch.no_grad():
            before = sum(float(self.error({"w": self.base.dequantize()}, {}, b)) for b in held)
            weights = {"w": found.packed["w"].dequantize()}
            after = sum(float(self.error(weights, found.factors, b)) for b in held)
        return before, after, found.factors


def test_windows_are_seen_once_and_held_out_ones_never() -> None:
    layer = Layer(torch.ones(64))
    before, after, _ = layer.distilled({})
    assert after <= before
    assert sorted(layer.trained) == list(range(WINDOWS - held_out(WINDOWS)))


def test_norms_learn_what_codes_cannot() -> None:
    norm = 1 + 0.05 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    layer = Layer(norm)
    before, with_norm, factors = layer.distilled({"norm": 64})
    _, without, _ = layer.distilled({})
    assert with_norm < without < before
    assert torch.corrcoef(torch.stack([factors["norm"], norm]))[0, 1] > 0.5


def test_what_is_worse_on_held_out_windows_is_not_taken() -> None:
    layer = Layer(torch.ones(64))
    layer.y = [y if batch >= 72 else -y for batch, y in enumerate(layer.y)]  # misleads
    found = distill({"w": layer.weight}, {"w": layer.base}, {"norm": 64}, layer.error, WINDOWS)
    assert found.packed["w"] is layer.base
    assert torch.equal(found.factors["norm"], torch.ones(64))


def test_few_batches_are_enough() -> None:
    assert [held_out(n) for n in (1, 2, 3, 8, 16, 64, 256)] == [0, 1, 1, 1, 2, 8, 8]


@pytest.mark.parametrize(
    ("family", "quantizer", "activations"),
    [
        ("llama", "distilled", None),
        ("llama", "distilled:scale-search+smooth", "same"),
        ("llama", "distilled@32", "same"),
        pytest.param("llama", "distilled@32", None, marks=pytest.mark.slow),
        pytest.param("gemma3", "distilled", None, marks=pytest.mark.slow),
        pytest.param("gpt2", "distilled", "same", marks=pytest.mark.slow),
    ],
)
def test_the_backend_runs_what_was_found(
    family: str, quantizer: str, activations: str | None, tmp_path: Path
) -> None:
    model, file = tiny(family), tmp_path / "c.safetensors"
    found = fp4graph.calibrate(
        model, BATCHES, format="mxfp4", quantizer=quantizer, activations=activations, out=file
    )
    assert found.smooth
    for fqn, smooth in found.smooth.items():
        assert torch.equal(smooth, found.smooth[fqn.replace("q_proj", "k_proj")]), "of one norm"
    for given in (found, file):
        torch._dynamo.reset()
        backend = fp4graph.backend(
            format="mxfp4", calibration=given, activations=activations, inner="eager"
        )
        out = logits(torch.compile(model, backend=backend))
        want = logits(stood_for(model, found, rounds=activations is not None))
        assert relative_l2(out, want) < (2e-6 if activations is None else 2e-2)


def stood_for(model: nn.Module, found: fp4graph.Calibration, *, rounds: bool) -> nn.Module:
    """Return the model with the weights that codes stand for, on inputs rounded as they are."""
    twin = copy.deepcopy(model)
    for fqn in found.packed:
        module = twin.get_submodule(fqn)
        w_NK = found.dequantize(fqn)
        with torch.no_grad():
            module.weight.copy_(w_NK.T if type(module).__name__ == "Conv1D" else w_NK)
        if rounds:
            transform = found.transform(fqn)

            def hook(_: nn.Module, args: tuple[Tensor], transform: Any = transform) -> Any:
                return (transform.undo_input(MXFP4.fake_quantize(transform.of_input(args[0]))),)

            module.register_forward_pre_hook(hook)
    return twin


def test_is_closer_than_gptq_on_other_text_and_w4a4_is_learned() -> None:
    model = tiny("llama")
    batches = [tokens(48, batch=2, seed=seed) for seed in range(48)]

    def distance(quantizer: str, calibrated: str | None, run: str | None) -> float:
        found = fp4graph.calibrate(
            model, batches, format="mxfp4", quantizer=quantizer, activations=calibrated
        )
        torch._dynamo.reset()
        backend = fp4graph.backend(
            format="mxfp4", calibration=found, activations=run, inner="eager"
        )
        return relative_l2(logits(torch.compile(model, backend=backend)), logits(model))

    assert distance("distilled", None, None) < distance("gptq:weighted-scale-search", None, None)
    assert distance("distilled", "same", "same") < distance("distilled", None, "same")


def test_parts_train_no_norm_and_heads_are_trained() -> None:
    found = fp4graph.calibrate(tiny("gpt2"), BATCHES, "v,mlp | lm_head", quantizer="distilled")
    assert not any("c_attn" in fqn for fqn in found.smooth), "q and k take the same input"
    assert any("mlp" in fqn for fqn in found.smooth)


def test_names() -> None:
    parse = Quantizer.parse
    assert parse("distilled", NVFP4) == parse("distilled:weighted-scale-search", NVFP4)
    assert parse("distilled", MXFP4_FITTED).grid == "rtn"
    assert parse("distilled:four-over-six@16", NVFP4).rotation == 16
    assert parse("distilled", MXFP4).needs_data
    with pytest.raises(fp4graph.OptionError, match="is for FP4"):
        parse("distilled", FP8)
    with pytest.raises(fp4graph.OptionError, match="needs data"):
        fp4graph.backend(quantizer="distilled")
