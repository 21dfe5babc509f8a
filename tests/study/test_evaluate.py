"""Windows, scores and their errors, checked against direct computation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from support.models import VOCAB, tiny, tokens

from fp4graph import CorpusError, StudyError
from fp4graph.study.evaluate import DenseReference, Scores, Windows, cut, mean_and_error

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


def _logits(ids: torch.Tensor, last: float) -> torch.Tensor:
    torch.manual_seed(int(ids.sum()))
    logits = torch.randn(1, ids.shape[1], 12)
    logits[..., 11] = last
    return logits


def test_a_token_that_both_models_rule_out_adds_nothing(tmp_path: Path) -> None:
    reference = _dense(tmp_path, lambda ids: _logits(ids, -math.inf))
    scores = reference.score(lambda ids: _logits(ids, -math.inf), lambda: None)
    assert scores.kl.tolist() == [0, 0]


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
        reference = _dense(tmp_path, lambda ids: _logits(ids, dense))
        reference.score(lambda ids: _logits(ids, model), lambda: None)

    with pytest.raises(StudyError, match=words):
        score()


def test_a_perplexity_beyond_float64_is_none() -> None:
    zeros = np.zeros(1)
    assert Scores(np.array([7200.0]), zeros, zeros, 10).perplexity is None
    assert Scores(np.array([10.0]), zeros, zeros, 10).perplexity == pytest.approx(math.e)


@pytest.mark.parametrize(
    "count, seq_len, words", [(8, 4, "fewer than the 8"), (3, 4, "a window"), (4, 1, "a window")]
)
def test_texts_that_do_not_do(count: int, seq_len: int, words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        cut("abcde", Letters(adds_bos=False), count, seq_len)


def test_mean_and_error_is_between_windows() -> None:
    sums = np.array([10.0, 20.0, 60.0])
    mean, error = mean_and_error(sums, tokens=10)
    assert mean == pytest.approx(3.0)
    assert error == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3))
    assert mean_and_error(sums[:1], 10) == (1.0, None)


@torch.no_grad()
def test_scores_against_direct_computation(tmp_path: Path) -> None:
    dense, other = tiny("llama"), tiny("llama", seed=1)
    windows = Windows(tokens(12, batch=3), first=1)
    ticks: list[int] = []
    reference = DenseReference(
        lambda ids: dense(ids).logits, windows, tmp_path, lambda: ticks.append(1)
    )
    scores = reference.score(lambda ids: other(ids).logits, lambda: ticks.append(1))
    p = dense(windows.ids).logits[:, :-1].double().log_softmax(-1)
    q = other(windows.ids).logits[:, :-1].double().log_softmax(-1)
    targets = windows.ids[:, 1:, None]
    assert np.allclose(reference.scores.nll, -p.gather(-1, targets).sum((1, 2)), rtol=1e-5)
    assert np.allclose(scores.nll, -q.gather(-1, targets).sum((1, 2)), rtol=1e-5)
    assert np.allclose(scores.kl, (p.exp() * (p - q)).sum((1, 2)), rtol=1e-5)
    assert scores.top1.tolist() == (p.argmax(-1) == q.argmax(-1)).sum(1).tolist()
    assert scores.perplexity == pytest.approx(math.exp(float(scores.nll.sum()) / 33))
    assert len(ticks) == 6
    assert not list(tmp_path.iterdir()), "the file has no name, so nothing can leave it behind"


@torch.no_grad()
def test_the_dense_model_scores_itself_as_undamaged(tmp_path: Path) -> None:
    dense = tiny("llama")
    windows = Windows(tokens(12, batch=2), first=2)
    reference = DenseReference(lambda ids: dense(ids).logits, windows, tmp_path, lambda: None)
    again = reference.score(lambda ids: dense(ids).logits, lambda: None)
    assert np.array_equal(again.nll, reference.scores.nll)
    assert not again.kl.any()
    assert again.top1.tolist() == [10, 10]


@torch.no_grad()
def test_a_disk_without_room_is_a_clear_error(tmp_path: Path) -> None:
    windows = Windows(tokens(8, batch=1), first=1)
    run = lambda ids: torch.zeros(1, ids.shape[1], VOCAB)  # noqa: E731
    with pytest.raises(StudyError, match=r"cannot keep .* use fewer --tokens"):
        DenseReference(run, windows, tmp_path / "missing", lambda: None)


def test_perplexity() -> None:
    sums = np.array([2 * math.log(7), 4 * math.log(7)])
    assert Scores(sums, sums, sums, tokens=3).perplexity == pytest.approx(7)
