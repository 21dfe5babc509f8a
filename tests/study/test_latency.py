"""Latency: what is counted, what is paired, and that variants run what they say."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.calibration import BATCHES
from support.models import tiny, tokens
from support.trials import Counted

import fp4graph
from fp4graph import OptionError, Policy, Scheme, SelectorError
from fp4graph.apart import ApartError, call_apart
from fp4graph.loading import load_packed, save
from fp4graph.models import LoadedModel
from fp4graph.study.latency import Runner, Variant, measure, mode_for, paired_ratio
from fp4graph.study.trial import DENSE, Trial

if TYPE_CHECKING:
    from pathlib import Path

VARIANTS = [
    Variant(DENSE, "eager"),
    Variant(Trial.of("all", "nvfp4"), "eager"),
    Variant(Trial.of("q,v", "mxfp4", "same"), "eager"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "gemma3"))]
)
def test_measures_every_variant(family: str) -> None:
    model = tiny(family).requires_grad_(False)
    variants = VARIANTS if family == "llama" else VARIANTS[:2]
    progress = Counted()
    rows = measure(
        LoadedModel(family, model, None),
        variants,
        prompt_tokens=8,
        new_tokens=5,
        rounds=3,
        progress=progress,
    )
    assert progress.done == progress.total == len(variants) * 4
    assert [row.selector for row in rows] == [variant.trial.select.text for variant in variants]
    for row in rows:
        assert row.recompiles == 0
        assert row.graph_breaks == 0
        assert row.ttft_s > 0
        assert row.prefill_tokens_per_s == pytest.approx(8 / row.ttft_s)
        p50, p90, p99 = row.per_token_ms.values()
        assert 0 < p50 <= p90 <= p99
        assert row.gb_per_s == pytest.approx(row.weight_bytes * row.decode_tokens_per_s / 1e9)
        assert row.compile_s > 5 * row.ttft_s
    assert rows[0].ratio is None
    assert rows[1].weight_bytes < rows[0].weight_bytes
    assert (
        json.loads(json.dumps(asdict(rows[1])))["ratio"]["decode"]["low"]
        <= rows[1].ratio["decode"].high
    )  # type: ignore[index]


def test_a_variant_generates_what_generate_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").requires_grad_(False)
    prompt = tokens(8)
    monkeypatch.setattr(import_module("fp4graph.study.latency"), "_prompt", lambda *_: prompt)
    runner = Runner(model, VARIANTS[0], 8, 6)
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert runner.tokens == expected[0, 8:].tolist()
    assert runner.report.graphs > 0


def test_attention_is_another_within() -> None:
    model = tiny("llama").requires_grad_(False)
    options = {"prompt_tokens": 4, "new_tokens": 3, "rounds": 2, "progress": Counted()}
    others = [Variant(DENSE, "eager", attention=how) for how in ("eager", "fp4graph")]
    rows = measure(LoadedModel("it", model, None), [VARIANTS[0], *others], **options)
    assert [row.attention for row in rows] == ["sdpa", "eager", "fp4graph"]
    assert [row.recompiles for row in rows] == [0, 0, 0]
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(OptionError, match="attention='quick'"):
        measure(
            LoadedModel("it", model, None),
            [Variant(DENSE, "eager", attention="quick")],
            **options,
        )


def test_misfits_are_errors() -> None:
    model = LoadedModel("it", tiny("llama").requires_grad_(False), None)
    options = {"prompt_tokens": 4, "new_tokens": 3, "rounds": 1, "progress": Counted()}
    with pytest.raises(SelectorError, match="matches nothing"):
        measure(model, [*VARIANTS, Variant(Trial.of("qkv", "nvfp4"), "eager")], **options)
    assert options["progress"].total == 0  # nothing was compiled
    with pytest.raises(OptionError, match="at least 1 prompt token"):
        measure(model, VARIANTS[:1], **{**options, "new_tokens": 1})


def test_cuda_graphs_are_the_default_on_gpus_with_inductor_alone() -> None:
    assert mode_for("cuda", "inductor") == "reduce-overhead"
    assert {mode_for("cuda", "eager"), mode_for("cpu", "inductor")} == {"default"}


def test_paired_ratio() -> None:
    rng = np.random.default_rng(0)
    noise = rng.lognormal(sigma=0.3, size=200)  # a busy neighbour slows both of a pair
    ratio = paired_ratio(2.0 * noise, 1.0 * noise * rng.normal(1, 0.01, 200))
    assert ratio.median == pytest.approx(2.0, rel=0.01)
    assert ratio.low < 2.0 < ratio.high
    assert ratio.high - ratio.low < 0.02


@pytest.mark.slow
def test_memory_is_that_of_a_process_for_each(tmp_path: Path) -> None:
    model = tiny("llama").requires_grad_(False)
    model.save_pretrained(tmp_path / "dense")
    loaded = fp4graph.models.load(str(tmp_path / "dense"))
    save(fp4graph.load(str(tmp_path / "dense"), "all"), tmp_path / "packed")
    packed = Trial.of_packed(load_packed(str(tmp_path / "packed")))
    codes = fp4graph.calibrate(loaded.model, BATCHES, quantizer="gptq")
    calibrated = Trial(Policy.of("all", Scheme.of(calibration=codes)))
    variants = [Variant(trial, "eager") for trial in (DENSE, calibrated, packed)]
    progress = Counted()
    options = {"prompt_tokens": 4, "new_tokens": 3, "rounds": 1, "progress": progress}
    rows = measure(loaded, variants, **options)
    assert progress.done == progress.total == 9
    assert not progress.notes
    for row in rows:
        assert 100e6 < row.resident_rss <= row.peak_rss
    dense, _, own = rows
    assert own.weight_bytes < 0.5 * dense.weight_bytes
    assert own.name == "packed"
    (given,) = measure(LoadedModel("it", model, None), variants[:1], **options)
    assert given.resident_rss is None


def fails(number: int) -> None:
    raise ValueError(f"it is {number}")


def test_a_call_apart_says_what_went_wrong() -> None:
    assert call_apart(math.hypot, 3, 4) == 5
    with pytest.raises(ApartError, match="ValueError: it is 7"):
        call_apart(fails, 7)
    with pytest.raises(ApartError, match="ended with 3"):
        call_apart(os._exit, 3)
