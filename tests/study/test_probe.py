"""Multiple choice by likelihood."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from support.models import byte_tokenizer, tiny, tokens
from support.trials import Counted

from fp4graph import CorpusError
from fp4graph.models import LoadedModel
from fp4graph.study.ablate import Ablation
from fp4graph.study.evaluate import Windows
from fp4graph.study.probe import Probe, read_probe
from fp4graph.study.store import Store
from fp4graph.study.trial import DENSE, Trial

if TYPE_CHECKING:
    from pathlib import Path

QUESTIONS = [
    {"context": "ab", "choices": ["c", "defg"], "answer": 0},
    {"context": "h", "choices": ["ij", "kl", "m"], "answer": 2},
]


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_reads_choices_as_rows(tmp_path: Path) -> None:
    probe = read_probe(write(tmp_path / "p.jsonl", *QUESTIONS), byte_tokenizer(), 8)
    assert probe.ids.shape == (5, 8)
    assert probe.questions == (0, 0, 1, 1, 1)
    assert probe.answers == (0, 2)
    starts, ends = zip(*probe.spans, strict=True)
    assert [end - start for start, end in probe.spans] == [1, 4, 2, 2, 1]
    assert len(set(starts)) == 2
    assert max(ends) <= 8


@torch.no_grad()
def test_takes_the_likelier_choice_a_token_whatever_is_behind() -> None:
    model = tiny("llama")
    ids = tokens(8, batch=4)
    probe = Probe(ids, ((2, 4), (2, 7), (3, 5), (3, 4)), (0, 0, 1, 1), (0, 1))
    found = probe.choices(lambda row: model(ids[row : row + 1]).logits, lambda: None)
    logp = model(ids).logits.double().log_softmax(-1)
    means = [
        logp[row, start - 1 : end - 1].gather(1, ids[row, start:end, None]).mean()
        for row, (start, end) in enumerate(probe.spans)
    ]
    assert found.tolist() == [int(means[1] > means[0]), int(means[3] > means[2])]
    assert probe.accuracy(np.array([0, 1])) == 1
    assert probe.accuracy(np.array([1, 1])) == 0.5


def test_trials_have_the_probe_beside_the_text(tmp_path: Path) -> None:
    model = tiny("llama").requires_grad_(False)
    probe = Probe(tokens(16, batch=6, seed=3), ((4, 9),) * 6, (0, 0, 1, 1, 2, 2), (0, 1, 0))
    windows = Windows(tokens(16, batch=4), first=1)
    count = Counted()
    loaded = LoadedModel("tiny", model, None)
    store = Store(tmp_path / "t.sqlite")
    ablation = Ablation(loaded, windows, store, tmp_path, probe=probe)
    dense, mlp = ablation.run([DENSE, Trial.of("mlp", "mxfp4", "same")], count)
    assert count.done == count.total == 2 * (4 + 6)
    assert dense.probe_same == 1
    run = lambda row: model(probe.ids[row : row + 1]).logits  # noqa: E731
    with torch.no_grad():
        assert dense.probe == probe.accuracy(probe.choices(run, lambda: None))
    assert mlp.probe in (0, 1 / 3, 2 / 3, 1)
    plain = Ablation(loaded, windows, store, tmp_path)
    (row,) = plain.run([DENSE])
    assert row.probe is None, "another identity"


@pytest.mark.parametrize(
    "line, words",
    [
        ({"context": "a", "choices": ["b"], "answer": 0}, "line 2: expected"),
        ({"context": "a", "choices": ["b", "c"], "answer": 2}, "line 2: expected"),
        ({"context": "a", "choices": ["b", 3], "answer": 1}, "line 2: expected"),
        ({"context": "a" * 9, "choices": ["b", "c"], "answer": 1}, "fit into --seq-len"),
        ({"context": "", "choices": ["b", "c"], "answer": 1}, "need tokens"),
        ("text", "line 2: expected"),
    ],
)
def test_lines_that_are_no_question(tmp_path: Path, line: object, words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        read_probe(write(tmp_path / "p.jsonl", QUESTIONS[0], line), byte_tokenizer(), 8)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="cannot read the probe"):
        read_probe(tmp_path / "none.jsonl", byte_tokenizer(), 8)
    with pytest.raises(CorpusError, match="has no questions"):
        read_probe(write(tmp_path / "p.jsonl"), byte_tokenizer(), 8)
