"""Trials: which, what they measure, and that nothing is lost or counted twice."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support.models import tiny, tokens
from support.trials import Counted, row
from support.trials import plan as plan_of

import fp4graph
from fp4graph import OptionError, SelectorError, StudyError
from fp4graph.models import LoadedModel
from fp4graph.study.ablate import Ablation
from fp4graph.study.evaluate import Windows
from fp4graph.study.plot import draw
from fp4graph.study.store import Store
from fp4graph.study.trial import DENSE, Row, Trial, selectors_by

if TYPE_CHECKING:
    from pathlib import Path


def ablation(path: Path, model: torch.nn.Module | None = None) -> Ablation:
    loaded = LoadedModel("tiny", model or tiny("llama").requires_grad_(False), None)
    return Ablation(loaded, Windows(tokens(16, batch=4), first=1), Store(path / "t.sqlite"), path)


def run(path: Path, plan: list[Trial], model: torch.nn.Module | None = None) -> list[Row]:
    return list(ablation(path, model).run(plan, Counted()))


def test_plan_is_dense_first_then_every_combination_once() -> None:
    plan = plan_of(
        "k,q", "q,k", "v", formats=["nvfp4", "mxfp4:floor"], activations=["none", "same"]
    )
    assert plan[0] == DENSE
    facts = [trial.facts for trial in plan[1:]]
    assert [(each["selector"], each["format"], each["activations"]) for each in facts] == [
        (s, f, a) for f in ("nvfp4", "mxfp4") for a in ("none", "same") for s in ("q,k", "v")
    ]


def test_except_brings_all_to_compare_with() -> None:
    plan = plan_of("q", directions=["only", "except"])
    assert plan == [
        DENSE,
        Trial.of("q", "nvfp4", "none", "only"),
        Trial.of("all", "nvfp4", "none", "only"),
        Trial.of("q", "nvfp4", "none", "except"),
    ]


def test_selectors_by(tmp_path: Path) -> None:
    report = ablation(tmp_path).report()
    assert selectors_by(report, "role") == ["q", "k", "v", "o", "gate", "up", "down"]
    assert selectors_by(report, "block") == ["blocks=0", "blocks=1"]
    assert selectors_by(report, "role,block")[:2] == ["q,blocks=0", "k,blocks=0"]
    assert len(selectors_by(report, "role, block")) == 14
    with pytest.raises(OptionError, match="expected role, block or role,block"):
        selectors_by(report, "layer")


def test_rows_measure_what_direct_computation_measures(tmp_path: Path) -> None:
    model = tiny("llama").requires_grad_(False)
    dense, row, rest = run(
        tmp_path,
        [DENSE, Trial.of("down", "mxfp4"), Trial.of("down", "mxfp4", "none", "except")],
        model,
    )
    ids = tokens(16, batch=4)

    def mean_nll(call: Any) -> float:
        total = 0.0
        for line in ids:
            p = call(line[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            total -= float(p.gather(1, line[1:, None]).sum())
        return total / (4 * 15)

    with torch.no_grad():
        base = mean_nll(model)
        only = mean_nll(
            torch.compile(model, backend=fp4graph.backend("down", format="mxfp4", inner="eager"))
        )
        but = mean_nll(
            torch.compile(model, backend=fp4graph.backend("!down", format="mxfp4", inner="eager"))
        )
    assert dense.ppl == pytest.approx(math.exp(base), rel=1e-6)
    assert (dense.dnll, dense.kl, dense.top1, dense.linears) == (0, 0, 1, 0)
    assert row.dnll == pytest.approx(only - base, rel=1e-4)
    assert rest.dnll == pytest.approx(but - base, rel=1e-4)
    assert row.kl > 0
    assert row.dnll_se is not None
    assert (row.linears, row.parameters, row.bytes_dense) == (2, 2 * 64 * 96, 2 * 64 * 96 * 4)
    assert row.bytes_packed == 2 * 64 * 3 * 17
    assert row.dnll_per_mb == pytest.approx(row.dnll / ((row.bytes_dense - row.bytes_packed) / 1e6))
    assert rest.linears == 12


def test_keeps_what_each_token_of_a_passage_cost(tmp_path: Path) -> None:
    row, windows = Trial.of("down", "mxfp4"), Windows(tokens(120, batch=2), first=1)

    class Words:
        def decode(self, ids: list[int]) -> str:
            return f"<{ids[0]}>"

    loaded = LoadedModel("tiny", tiny("llama").requires_grad_(False), Words())
    store = Store(tmp_path / "t.sqlite")
    study = Ablation(loaded, windows, store, tmp_path)
    *_, (measured) = study.run([DENSE, row], Counted())
    text = windows.digest()
    assert store.tokens(text) == [f"<{each}>" for each in windows.ids[0, 1:].tolist()]
    ((key, content),) = store.passages(text).items()
    assert key == next(each.key for each in store.all() if each.row.format)
    kl = np.frombuffer(content, "<f2").astype(float)
    assert len(kl) == 119, "of the first window"
    assert kl.mean() == pytest.approx(measured.kl, rel=0.5)
    assert (kl > 0).mean() > 0.9


def test_w4a4_differs_from_w4a16(tmp_path: Path) -> None:
    _, weights, both = run(
        tmp_path, [DENSE, Trial.of("q", "nvfp4"), Trial.of("q", "nvfp4", "same")]
    )
    assert both.kl > weights.kl > 0


def test_what_is_in_the_store_is_not_run_again(tmp_path: Path) -> None:
    plan = plan_of("q", "v")
    first = run(tmp_path, plan)
    progress = Counted()
    again = list(ablation(tmp_path).run(plan, progress))
    assert again == first
    assert (progress.total, progress.done, progress.kept) == (0, 0, [True] * 3)
    more = Counted()
    list(ablation(tmp_path).run([*plan, Trial.of("k", "nvfp4")], more))
    assert more.kept == [True, True, True, False]
    assert more.total == more.done == 2 * 4, "the dense model once more, and the new trial"


def test_another_model_text_or_format_is_another_trial(tmp_path: Path) -> None:
    (dense, q) = run(tmp_path, [DENSE, Trial.of("q", "nvfp4")])
    (other, _) = run(
        tmp_path, [DENSE, Trial.of("q", "nvfp4")], tiny("llama", seed=3).requires_grad_(False)
    )
    assert other.ppl != dense.ppl
    (_, mx) = run(tmp_path, [DENSE, Trial.of("q", "mxfp4")])
    assert mx.dnll != q.dnll


def test_with_activations_in_fp4_a_trial_is_of_one_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("q", activations=["none", "same"])
    run(tmp_path, plan)
    real = Ablation._logits

    def last_digit(self: Ablation, index: int) -> torch.Tensor:
        logits = real(self, index)
        logits.view(-1)[-1].nextafter_(torch.tensor(math.inf))
        return logits

    monkeypatch.setattr(Ablation, "_logits", last_digit)
    progress = Counted()
    list(ablation(tmp_path).run(plan, progress))
    assert progress.kept == [True, True, False]


def test_check_finds_misfits_before_the_first_trial(tmp_path: Path) -> None:
    study = ablation(tmp_path)
    with pytest.raises(SelectorError, match="`qkv` matches nothing"):
        study.check([DENSE, Trial.of("q", "nvfp4"), Trial.of("qkv", "nvfp4")])
    with pytest.raises(SelectorError, match="leaves no linear"):
        study.check([Trial.of("all", "nvfp4", "none", "except")])


def test_random_weights_are_refused(tmp_path: Path) -> None:
    loaded = LoadedModel("tiny", tiny("llama"), None, is_random=True)
    with pytest.raises(StudyError, match="random weights"):
        Ablation(loaded, Windows(tokens(), 1), Store(tmp_path / "t.sqlite"), tmp_path)


def test_a_trial_whose_graph_did_not_run_is_an_error() -> None:
    traced = fp4graph.TracedModel(tiny("llama"))
    with torch.no_grad():
        traced(tokens(), use_cache=False)
        with (
            torch.compiler.set_stance("force_eager"),
            pytest.raises(StudyError, match="without its traced graph"),
        ):
            traced(tokens(), use_cache=False)


@pytest.mark.slow
def test_rewriting_a_trace_is_what_compiling_afresh_gives() -> None:
    model = tiny("llama")
    traced = fp4graph.TracedModel(model)
    with torch.no_grad():
        plain = traced(tokens(), use_cache=False).logits
        for select in ("q", "all", "blocks=1", "none", "all | lm_head"):
            policy = fp4graph.Policy.of(select, fp4graph.Scheme.of("mxfp4"))
            traced.select(policy)
            out = traced(tokens(), use_cache=False).logits
            backend = fp4graph.backend(select, format="mxfp4", inner="eager")
            expected = torch.compile(model, backend=backend)(tokens(), use_cache=False).logits
            assert torch.equal(out, expected), select
        traced.select(None)
        assert torch.equal(traced(tokens(), use_cache=False).logits, plain)


def test_store_survives_a_stranger_and_a_second_writer(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    one, two = Store(path), Store(path)
    one.put({"a": 1}, row("q", 1.5))
    two.put({"a": 1}, row("q", 9.0))
    assert one.get({"a": 1}) == two.get({"a": 1}) == row("q", 1.5)
    assert one.get({"a": 2}) is None
    (tmp_path / "no.sqlite").write_text("this is no database, but a text of some length" * 40)
    with pytest.raises(StudyError, match="cannot open the results"):
        Store(tmp_path / "no.sqlite")


def test_draws_bars_and_heat_maps(tmp_path: Path) -> None:
    rows = run(
        tmp_path, plan_of("q", "down", formats=["nvfp4", "mxfp4"], directions=["only", "except"])
    )
    draw(rows, "bars", tmp_path / "bars.png")
    grid = run(tmp_path, plan_of("q,blocks=0", "q,blocks=1", "v,blocks=0"))
    draw(grid, "grid", tmp_path / "grid.png")
    for name in ("bars.png", "grid.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_rows_have_these_keys(tmp_path: Path) -> None:
    rows = run(tmp_path, [DENSE, Trial.of("q", "nvfp4")])
    keys = (
        "selector format activations quantizer direction ppl dnll dnll_se kl kl_se top1 "
        "linears parameters bytes_dense bytes_packed dnll_per_mb dnll_low dnll_high kl_p50 kl_p90 "
        "kl_p99 kl_per_mb dnll_per_mparam kl_per_mparam noise noise_se "
        "probe probe_same name"
    )
    dense, q = map(asdict, rows)
    assert list(dense) == list(q) == keys.split()
    assert dense["selector"] == "none"
    assert dense["noise"] > 0
    assert q["noise"] is None
    assert q["dnll_low"] <= q["dnll"] <= q["dnll_high"]
    assert 0 <= q["kl_p50"] <= q["kl_p90"] <= q["kl_p99"]
    assert q["kl_per_mparam"] == pytest.approx(q["kl"] / (q["parameters"] / 1e6))


def test_after_the_budget_no_trial_begins_and_the_next_run_goes_on(tmp_path: Path) -> None:
    plan = plan_of("q", "v", "down")
    first = list(ablation(tmp_path).run(plan, Counted(), seconds=0))
    assert len(first) <= 1
    rest = list(ablation(tmp_path).run(plan, Counted()))
    assert [row.selector for row in rest] == ["none", "q", "v", "down"]
    again = list(ablation(tmp_path).run(plan, Counted(), seconds=0))
    assert again == rest
