"""Scores from one run against the divergence that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import dequantised, tiny, tokens

import fp4graph
from fp4graph import OptionError, Scheme, StudyError
from fp4graph.models import LoadedModel
from fp4graph.study.evaluate import Windows
from fp4graph.study.sensitivity import Sensitivity, SensitivityRow, _pooled, kl_of

WINDOWS = Windows(tokens(12, batch=3), first=1)


def loaded(family: str = "llama") -> LoadedModel:
    return LoadedModel("tiny", tiny(family).requires_grad_(False), None)


def divergence(select: str, mode: str | None = None, family: str = "llama") -> float:
    """Return the KL divergence of a model with FP4 in it from itself, nats a token."""
    plain = tiny(family)
    changed = torch.compile(
        tiny(family), backend=fp4graph.backend(select, activations=mode, inner="eager")
    )
    found = []
    with torch.no_grad():
        for ids in WINDOWS.ids.split(1):
            p, q = (
                m(ids, use_cache=False).logits[0, :-1].log_softmax(-1) for m in (plain, changed)
            )
            found.append((p.exp() * (p - q)).sum(-1).mean())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("mode", [None, "same"])
def test_is_the_divergence_to_second_order(mode: str | None) -> None:
    found = Sensitivity(loaded(), WINDOWS, [Scheme.of(activations=mode)], samples=300)
    rows = {row.path: row for row in found.rows}
    assert len(rows) == 14
    products = found.products["nvfp4", mode or "none"]
    for role, path in (("v", "self_attn.v_proj"), ("down", "mlp.down_proj")):
        row = rows[f"model.layers.1.{path}"]
        assert row.kl_window == pytest.approx(divergence(f"{role},blocks=1", mode), rel=0.3)
        assert row.kl_element != row.kl_token
    together = torch.stack(list(products.values())).sum(0)
    assert kl_of(together, WINDOWS) == pytest.approx(divergence("all", mode), rel=0.35)


def test_first_order_is_the_derivative_of_the_loss() -> None:
    found = Sensitivity(loaded(), WINDOWS, [Scheme.of()])
    row = next(row for row in found.rows if row.path == "model.layers.0.mlp.up_proj")
    model = tiny("llama")
    weight = model.get_parameter(f"{row.path}.weight")
    model(WINDOWS.ids, labels=WINDOWS.ids, use_cache=False).loss.backward()
    change = fp4graph.quantize(weight, "nvfp4").dequantize() - weight.detach()
    assert weight.grad is not None
    expected = float((weight.grad * change).sum())
    assert row.dnll - row.kl == pytest.approx(expected, rel=1e-3)
    assert row.weight_error == pytest.approx(
        float(change.square().sum() / weight.detach().square().sum())
    )
    assert row.sqnr == pytest.approx(-10 * math.log10(row.output_error))


def row(path: str, window: float, role: str = "q") -> SensitivityRow:
    scheme = ("nvfp4", "none", "rtn")
    return SensitivityRow(path, role, 0, *scheme, 1, 0, 0, 0, 0, 1.0, 4.0, window, 2.0, 0.0, 0.5)


def test_noise_is_drawn_to_the_role_s_mean() -> None:
    alike = [row("a", 3.9), row("b", 4.1)]
    many, few = (_pooled(alike, samples) for samples in (100_000, 4))
    assert [each.kl for each in many] == pytest.approx([3.9, 4.1], rel=1e-3), "all is signal"
    assert few[0].kl == pytest.approx(few[1].kl), "all is noise"
    assert few[0].kl > 4, "the logarithm of a noisy mean is too low on average"
    assert few[0].dnll == 0.5 + few[0].kl
    others = _pooled([*alike, row("c", 100.0, "v")], 4)
    assert others[:2] == few
    assert _pooled([row("a", 0.0)], 4)[0].kl == 2.0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_output_error_is_what_a_hook_sees(family: str) -> None:
    scores = Sensitivity(loaded(family), WINDOWS, [Scheme.of("mxfp4")])
    row = next(row for row in scores.rows if row.role == "down" and row.block == 1)
    plain = tiny(family)
    report = fp4graph.explain(plain, WINDOWS.ids, select="down,blocks=1", use_cache=False)
    rounded = dequantised(plain, report, "mxfp4")
    seen: list[torch.Tensor] = []
    plain.get_submodule(row.path).register_forward_hook(lambda m, x, y: seen.extend((x[0], y)))
    with torch.no_grad():
        plain(WINDOWS.ids, use_cache=False)
        x, y = seen
        module = rounded.get_submodule(row.path)
        change = module(x) - y
        y = y if module.bias is None else y - module.bias
        expected = float(change.square().sum() / y.square().sum())
    assert row.output_error == pytest.approx(expected, rel=1e-3)


def test_says_what_it_costs() -> None:
    ticks: list[int] = []
    found = Sensitivity(loaded(), WINDOWS, [Scheme.of()], progress=lambda: ticks.append(1))
    assert len(ticks) == 3
    assert found.forwards > 1


def test_says_what_it_leaves_out() -> None:
    made = loaded()
    norm = torch.nn.utils.parametrizations.weight_norm
    norm(made.model.get_submodule("model.layers.1.mlp.up_proj"))
    made.model.requires_grad_(False)
    found = Sensitivity(made, WINDOWS, [Scheme.of()])
    assert found.left_out == ["model.layers.1.mlp.up_proj"]
    assert len(found.rows) == 13


def test_refuses_what_it_cannot_score() -> None:
    with pytest.raises(OptionError, match="scale-search@16"):
        Sensitivity(loaded(), WINDOWS, [Scheme.of(quantizer="scale-search@16")])
    broken = loaded()
    broken.model.get_parameter("model.norm.weight").fill_(torch.nan)
    with pytest.raises(StudyError, match="its logits hold NaN"):
        Sensitivity(broken, WINDOWS, [Scheme.of()])
    with pytest.raises(StudyError, match="random weights"):
        Sensitivity(
            LoadedModel("tiny", tiny("llama"), None, is_random=True), WINDOWS, [Scheme.of()]
        )
