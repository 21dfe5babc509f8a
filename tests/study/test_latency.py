"""Latency: what is counted, what is paired, and that variants run what they say."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import asdict

import numpy as np
import pytest
from support.models import tiny, tokens
from support.trials import Counted

from fp4graph import OptionError, SelectorError
from fp4graph.study.latency import Variant, _Runner, measure, paired_ratio
from fp4graph.study.trial import DENSE, Trial

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
    rows = measure(model, variants, prompt_tokens=8, new_tokens=5, rounds=3, progress=progress)
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
        assert row.peak_rss > 50e6
    assert rows[0].ratio is None
    assert rows[1].weight_bytes < rows[0].weight_bytes
    assert (
        json.loads(json.dumps(asdict(rows[1])))["ratio"]["decode"]["low"]
        <= rows[1].ratio["decode"].high
    )  # type: ignore[index]


def test_a_variant_generates_what_generate_does() -> None:
    model = tiny("llama").requires_grad_(False)
    prompt = tokens(8)
    runner = _Runner(model, VARIANTS[0], prompt, 6)
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert runner.tokens == expected[0, 8:].tolist()
    assert runner.report.graphs > 0


def test_misfits_are_errors() -> None:
    model = tiny("llama").requires_grad_(False)
    options = {"prompt_tokens": 4, "new_tokens": 3, "rounds": 1, "progress": Counted()}
    with pytest.raises(SelectorError, match="matches nothing"):
        measure(model, [*VARIANTS, Variant(Trial.of("qkv", "nvfp4"), "eager")], **options)
    assert options["progress"].total == 0  # nothing was compiled
    with pytest.raises(OptionError, match="at least 1 prompt token"):
        measure(model, VARIANTS[:1], **{**options, "new_tokens": 1})


def test_paired_ratio() -> None:
    rng = np.random.default_rng(0)
    noise = rng.lognormal(sigma=0.3, size=200)  # a busy neighbour slows both of a pair
    ratio = paired_ratio(2.0 * noise, 1.0 * noise * rng.normal(1, 0.01, 200))
    assert ratio.median == pytest.approx(2.0, rel=0.01)
    assert ratio.low < 2.0 < ratio.high
    assert ratio.high - ratio.low < 0.02


@pytest.mark.slow
def test_peak_rss_starts_anew() -> None:
    code = """
        import torch
        from fp4graph.study.latency import _peak_rss, _reset_peak_rss
        _reset_peak_rss()
        before = _peak_rss()
        block = torch.ones(50_000_000)
        with_block = _peak_rss()
        del block
        _reset_peak_rss()
        print(with_block - before, _peak_rss() - with_block)
    """
    done = subprocess.run(  # other tests' memory would blur it
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    up, down = map(int, done.stdout.split())
    assert up > 150e6
    assert down < 0
