"""How far a model is from its dense self on a text: NLL, KL divergence, top-1 agreement."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fp4graph.errors import CorpusError, StudyError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Windows:
    """A text cut into windows that are scored one by one.

    Attributes:
        ids: token ids, int64 [windows, length].
        first: position of the first scored token; what stands before it is context only.
    """

    ids: Tensor
    first: int

    @property
    def scored(self) -> int:
        """Scored tokens a window."""
        return self.ids.shape[1] - self.first

    def digest(self) -> str:
        """Return a hash of the tokens and of how they are cut."""
        content = self.ids.numpy().tobytes() + repr((tuple(self.ids.shape), self.first)).encode()
        return hashlib.sha256(content).hexdigest()[:16]


def cut(text: str, tokenizer: Any, tokens: int, seq_len: int) -> Windows:
    """Tokenise a text, take its first tokens, cut them into windows that do not overlap.

    A BOS stands in front of each window only where the tokenizer adds one by default. A window's
    first text token is context only, and tokens beyond the last whole window are dropped.

    Args:
        text: the corpus.
        tokenizer: of the model.
        tokens: how many tokens of the text to use.
        seq_len: text tokens in a window.

    Raises:
        CorpusError: the text has fewer tokens, or they do not fill one window.
    """
    if seq_len < 2 or tokens < seq_len:
        problem = "a window needs 2 tokens or more, and the tokens must fill one"
        raise CorpusError(f"{tokens} tokens in windows of {seq_len}: {problem}")
    ids = _tokenize(text, tokenizer, tokens)
    if len(ids) < tokens:
        raise CorpusError(f"the text has {len(ids)} tokens, fewer than the {tokens} asked for")
    count = len(ids) // seq_len
    rows = torch.tensor(ids[: count * seq_len], dtype=torch.int64).reshape(count, seq_len)
    default = tokenizer("a")["input_ids"]
    if tokenizer.bos_token_id is None or default[0] != tokenizer.bos_token_id:
        return Windows(rows, first=1)
    bos = torch.full((count, 1), tokenizer.bos_token_id)
    return Windows(torch.cat((bos, rows), dim=1), first=2)


def _tokenize(text: str, tokenizer: Any, tokens: int) -> list[int]:
    """Return the first tokens of a text, or all if there are fewer, reading no more than it needs.

    The tokens at the end of a piece may be others than in the whole text: a margin is left.
    """
    length = tokens * _CHARACTERS_A_TOKEN
    while True:
        piece = text[:length]
        ids: list[int] = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if len(piece) == len(text) or len(ids) >= tokens + _MARGIN:
            return ids[:tokens]
        length *= 2


_CHARACTERS_A_TOKEN = 8
_MARGIN = 64


@dataclass(frozen=True)
class Scores:
    """Sums over the scored tokens of each window, float64 [windows].

    Attributes:
        nll: negative log likelihood, nats.
        kl: KL divergence of the model from the dense model, nats.
        top1: tokens where both models' likeliest token is the same.
        tokens: scored tokens a window.
    """

    nll: Floats
    kl: Floats
    top1: Floats
    tokens: int

    @property
    def perplexity(self) -> float | None:
        """Exp of the mean NLL; None where that is beyond float64."""
        nll = float(self.nll.mean()) / self.tokens
        return math.exp(nll) if nll < _LARGEST_EXPONENT else None


_LARGEST_EXPONENT = math.log(sys.float_info.max)


def mean_and_error(sums: Floats, tokens: int) -> tuple[float, float | None]:
    """Return a mean per token and its standard error, windows being the independent units.

    Tokens within a window are correlated, so the spread is taken between windows. One window has
    no spread: its error is None.
    """
    means = sums / tokens
    if len(means) < 2:
        return float(means.mean()), None
    return float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))


class DenseReference:
    """The dense model's log probabilities on all windows: float32 [windows, scored, vocab].

    They are mapped from a file, for they can outgrow the memory, and the file's name is removed as
    soon as it is mapped, so that not even kill -9 leaves it behind.

    Args:
        run: the dense model, token ids [1, length] to logits [1, length, vocab].
        windows: the text.
        folder: whose disk the file takes up.
        progress: called once after each window.

    Raises:
        StudyError: the file cannot be written, for instance for lack of space.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        windows: Windows,
        folder: Path,
        progress: Callable[[], None],
    ) -> None:
        self.windows = windows
        self._file: np.memmap[Any, np.dtype[np.float32]] | None = None
        sums = []
        for index, row in enumerate(windows.ids):
            logp_TV = _log_probabilities(run, row, windows)
            if self._file is None:
                self._file = _allocate(folder, (len(windows.ids), *logp_TV.shape))
            self._file[index] = logp_TV.numpy()
            sums.append(_nll(logp_TV, row[windows.first :]))
            progress()
        zeros = np.zeros(len(sums))
        self.scores = Scores(np.array(sums), zeros, zeros + windows.scored, windows.scored)

    def score(self, run: Callable[[Tensor], Tensor], progress: Callable[[], None]) -> Scores:
        """Score another model on the same windows."""
        assert self._file is not None
        sums = []
        for index, row in enumerate(self.windows.ids):
            logp_TV = _log_probabilities(run, row, self.windows)
            dense_TV = torch.from_numpy(self._file[index])
            same = logp_TV.argmax(-1) == dense_TV.argmax(-1)
            nll = _nll(logp_TV, row[self.windows.first :])
            sums.append((nll, _kl(dense_TV, logp_TV), float(same.sum())))
            progress()
        nll_W, kl_W, top1_W = np.array(sums).T
        return Scores(nll_W, kl_W, top1_W, self.windows.scored)


def _log_probabilities(run: Callable[[Tensor], Tensor], row: Tensor, windows: Windows) -> Tensor:
    logits_TV = run(row[None])[0, windows.first - 1 : -1].to(torch.float32).cpu()
    logp_TV = logits_TV.log_softmax(-1)
    if bool(logp_TV.isnan().any()):
        raise StudyError("its logits hold NaN or +Inf, so there is nothing to measure")
    return logp_TV


def _nll(logp_TV: Tensor, targets_T: Tensor) -> float:
    nll = -float(logp_TV.gather(1, targets_T[:, None]).sum(dtype=torch.float64))
    if not math.isfinite(nll):
        raise StudyError("it gives a token of the text probability 0 (a logit of -Inf)")
    return nll


def _kl(dense_TV: Tensor, logp_TV: Tensor) -> float:
    p_TV = dense_TV.exp()
    # a token that the dense model rules out (a logit of -Inf) adds nothing
    kl = float((p_TV * (dense_TV - logp_TV)).where(p_TV > 0, 0).sum(dtype=torch.float64))
    if not math.isfinite(kl):
        raise StudyError("it rules out a token that the dense model does not (a logit of -Inf)")
    return kl


def _allocate(folder: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.float32]]:
    """Map a nameless file, its blocks reserved: a full disk is an error now, not a crash later."""
    size = math.prod(shape) * 4
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="dense-", suffix=".f32") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
    except OSError as error:
        raise StudyError(
            f"cannot keep the dense model's {size / 1e9:.1f} GB of log probabilities in {folder} "
            f"({error.strerror}): use fewer --tokens, or an --out folder with more room"
        ) from None
