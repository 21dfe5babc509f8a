"""Windows, scores and their errors, checked against direct computation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from support.models import VOCAB, tiny, tokens

from fp4graph import CorpusError, StudyError
from fp4graph.study.evaluate import DenseReference, Scores, Windows, cut

if TYPE_CHECKING:
    from pathlib import Path


class Letters:
    """A tokenizer of letters, with a BOS or without."""

    bos_token_id = 1

    def __init__(self, *, adds_bos: bool) -> None:
        self._adds_bos = adds_bos

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        ids = [ord(letter) - 94 for letter in text]
        return {"input_ids": [1, *ids] if self._adds_bos and add_special_tokens else ids}


def test_windows_do_not_overlap_and_drop_the_tail() -> None:
    windows = cut("abcdefghij", Letters(adds_bos=False), tokens=10, seq_len=4)
    assert windows.ids.tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]
    assert (windows.first, windows.scored) == (1, 3)


def test_bos_stands_in_front_only_where_the_tokenizer_adds_one() -> None:
    windows = cut("abcdefgh", Letters(adds_bos=True), tokens=8, seq_len=4)
    assert windows.ids.tolist() == [[1, 3, 4, 5, 6], [1, 7, 8, 9, 10]]
    assert (windows.first, windows.scored) == (2, 3), "the first text token is not scored"


def test_digest_tells_texts_and_cuts_apart() -> None:
    tokenizer = Letters(adds_bos=False)
    cuts = [("abcdefgh", 4), ("abcdefgh", 8), ("abcdefgi", 4)]
    digests = {cut(text, tokenizer, 8, seq_len).digest() for text, seq_len in cuts}
    assert len(digests) == 3


def test_no_more_of_a_text_is_tokenised_than_is_needed() -> None:
    read = []

    class Counts(Letters):
        def __call__(
            self, text: str, add_special_tokens: bool = True, verbose: bool = True
        ) -> dict[str, list[int]]:
            read.append(len(text))
            return {"input_ids": [3] * max(1, len(text) // 20)}

    windows = cut("a" * 1_000_000, Counts(adds_bos=False), tokens=100, seq_len=10)
    assert windows.ids.numel() == 100
    assert sum(read) < 20_000


def _dense(tmp_path: Path, run: object) -> DenseReference:
    windows = Windows(torch.randint(0, 10, (2, 8)), first=1)
    return DenseReference(run, windows, tmp_path, lambda: None)  # type: ignore[arg-type]


def _logits(index: int, last: float) -> torch.Tensor:
    torch.manual_seed(index)
    logits = torch.randn(1, 8, 12)
    logits[..., 11] = last
    return logits


def test_a_token_that_both_models_rule_out_adds_nothing(tmp_path: Path) -> None:
    reference = _dense(tmp_path, lambda index: _logits(index, -math.inf))
    scores = reference.score(lambda index: _logits(index, -math.inf), lambda: None)
    assert not scores.kl.any()


@pytest.mark.parametrize(
    "dense, model, words",
    [
        (math.nan, 0, "NaN"),
        (0, math.nan, "NaN"),
        (0, math.inf, r"NaN or \+Inf"),
        (0, -math.inf, "rules out a token"),
    ],
)
def test_logits_that_cannot_be_scored(
    tmp_path: Path, dense: float, model: float, words: str
) -> None:
    def score() -> None:
        reference = _dense(tmp_path, lambda index: _logits(index, dense))
        reference.score(lambda index: _logits(index, model), lambda: None)

    with pytest.raises(StudyError, match=words):
        score()


def test_a_perplexity_beyond_float64_is_none() -> None:
    zeros, same = np.zeros((1, 2)), np.ones((1, 2), bool)
    assert Scores(zeros + 720, zeros, same).perplexity is None
    assert Scores(zeros + 1, zeros, same).perplexity == pytest.approx(math.e)
    assert Scores(np.array([[0.0, 2.0]]), zeros, same).perplexity == pytest.approx(math.e)


@pytest.mark.parametrize(
    "count, seq_len, words", [(8, 4, "fewer than the 8"), (3, 4, "a window"), (4, 1, "a window")]
)
def test_texts_that_do_not_do(count: int, seq_len: int, words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        cut("abcde", Letters(adds_bos=False), count, seq_len)


@torch.no_grad()
def test_scores_against_direct_computation(tmp_path: Path) -> None:
    dense, other = tiny("llama"), tiny("llama", seed=1)
    windows = Windows(tokens(12, batch=3), first=1)
    ticks: list[int] = []
    reference = DenseReference(
        lambda i: dense(windows.ids[i : i + 1]).logits, windows, tmp_path, lambda: ticks.append(1)
    )
    scores = reference.score(
        lambda i: other(windows.ids[i : i + 1]).logits, lambda: ticks.append(1)
    )
    p = dense(windows.ids).logits[:, :-1].double().log_softmax(-1)
    q = other(windows.ids).logits[:, :-1].double().log_softmax(-1)
    targets = windows.ids[:, 1:, None]
    assert np.allclose(reference.scores.nll, -p.gather(-1, targets)[..., 0], rtol=1e-5)
    assert np.allclose(scores.nll, -q.gather(-1, targets)[..., 0], rtol=1e-5)
    assert np.allclose(scores.kl, (p.exp() * (p - q)).sum(2), rtol=1e-5)
    assert scores.same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert scores.perplexity == pytest.approx(math.exp(float(scores.nll.sum()) / 33))
    assert len(ticks) == 6
    assert not list(tmp_path.iterdir()), "the file has no name, so nothing can leave it behind"


@torch.no_grad()
def test_the_dense_model_scores_itself_as_undamaged(tmp_path: Path) -> None:
    dense = tiny("llama")
    windows = Windows(tokens(12, batch=2), first=2)
    run = lambda i: dense(windows.ids[i : i + 1]).logits  # noqa: E731
    reference = DenseReference(run, windows, tmp_path, lambda: None)
    again = reference.score(run, lambda: None)
    assert np.array_equal(again.nll, reference.scores.nll)
    assert not again.kl.any()
    assert again.same.shape == (2, 10)
    assert again.same.all()


@torch.no_grad()
def test_a_disk_without_room_is_a_clear_error(tmp_path: Path) -> None:
    windows = Windows(tokens(8, batch=1), first=1)
    run = lambda index: torch.zeros(1, 8, VOCAB)  # noqa: E731
    with pytest.raises(StudyError, match=r"cannot keep .* use fewer --tokens"):
        DenseReference(run, windows, tmp_path / "missing", lambda: None)
