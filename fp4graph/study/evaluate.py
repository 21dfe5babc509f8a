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
from fp4graph.memory import fits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Floats = np.ndarray[Any, np.dtype[np.float64]]
    Booleans = np.ndarray[Any, np.dtype[np.bool_]]


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


def cut(text: str, tokenizer: Any, tokens: int | None, seq_len: int) -> Windows:
    """Tokenise a text, take its first tokens, cut them into windows that do not overlap.

    A BOS stands in front of each window only where the tokenizer adds one by default. A window's
    first text token is context only, and tokens beyond the last whole window are dropped.

    Args:
        text: the corpus.
        tokenizer: of the model.
        tokens: how many tokens of the text to use; None for all.
        seq_len: text tokens in a window.

    Raises:
        CorpusError: the text has fewer tokens, or they do not fill one window.
    """
    ids = _tokenize(text, tokenizer, tokens)
    wanted = len(ids) if tokens is None else tokens
    if seq_len < 2 or wanted < seq_len:
        problem = "a window needs 2 tokens or more, and the tokens must fill one"
        raise CorpusError(f"{wanted} tokens in windows of {seq_len}: {problem}")
    if len(ids) < wanted:
        raise CorpusError(f"the text has {len(ids)} tokens, fewer than the {wanted} asked for")
    count = len(ids) // seq_len
    rows = torch.tensor(ids[: count * seq_len], dtype=torch.int64, device="cpu")
    rows = rows.reshape(count, seq_len)
    if not adds_bos(tokenizer):
        return Windows(rows, first=1)
    bos = torch.full((count, 1), tokenizer.bos_token_id, device="cpu")
    return Windows(torch.cat((bos, rows), dim=1), first=2)


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a BOS in front by default."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][0] == bos


def _tokenize(text: str, tokenizer: Any, tokens: int | None) -> list[int]:
    """Return the first tokens of a text, or all if there are fewer, reading no more than it needs.

    The tokens at the end of a piece may be others than in the whole text: a margin is left.
    """
    length = len(text) if tokens is None else tokens * _CHARACTERS_A_TOKEN
    while True:
        piece = text[:length]
        ids: list[int] = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if len(piece) == len(text) or len(ids) >= (tokens or 0) + _MARGIN:
            return ids[:tokens]
        length *= 2


_CHARACTERS_A_TOKEN = 8
_MARGIN = 64


@dataclass(frozen=True)
class Scores:
    """What every scored token of every window came to, [windows, tokens].

    Attributes:
        nll: negative log likelihood, nats, float64.
        kl: KL divergence of the model from the dense model, nats, float64.
        same: whether both models' likeliest token is the same.
    """

    nll: Floats
    kl: Floats
    same: Booleans

    @property
    def perplexity(self) -> float | None:
        """Exp of the mean NLL; None where that is beyond float64."""
        nll = float(self.nll.mean())
        return math.exp(nll) if nll < _LARGEST_EXPONENT else None


_LARGEST_EXPONENT = math.log(sys.float_info.max)


class DenseReference:
    """The dense model's log probabilities on all windows: float32 [windows, scored, vocab].

    They stay on the model's accelerator if they fit. Else they are mapped from a file: they can
    outgrow the memory. The file's name is removed as soon as it is mapped, so that not even
    kill -9 leaves it behind.

    Args:
        run: the dense model, number of a window to logits [1, length, vocab].
        windows: the text.
        folder: whose disk the file takes up.
        progress: called once after each window.

    Raises:
        StudyError: the file cannot be written, for instance for lack of space.
    """

    def __init__(
        self,
        run: Callable[[int], Tensor],
        windows: Windows,
        folder: Path,
        progress: Callable[[], None],
    ) -> None:
        self.windows = windows
        self._logp_WTV: Tensor | None = None
        shape = len(windows.ids), windows.scored
        nll_WT, self._likeliest_WT = np.empty(shape), np.empty(shape, np.int64)
        for index in range(len(windows.ids)):
            logits_TV = self._logits(run, index)
            if self._logp_WTV is None:
                full_shape = len(windows.ids), *logits_TV.shape
                self._logp_WTV = _allocate(folder, full_shape, logits_TV.device)
            for rows, logp_RV in _log_probabilities(logits_TV):
                self._logp_WTV[index, rows] = logp_RV.to(self._logp_WTV.device)
                self._likeliest_WT[index, rows] = logp_RV.argmax(-1).cpu()
                nll_WT[index, rows] = _nll(logp_RV, self._targets(index)[rows])
            progress()
        self.scores = Scores(nll_WT, np.zeros(shape), np.ones(shape, bool))

    def score(self, run: Callable[[int], Tensor], progress: Callable[[], None]) -> Scores:
        """Score another model on the same windows."""
        assert self._logp_WTV is not None
        shape = self.scores.nll.shape
        nll_WT, kl_WT, same_WT = np.empty(shape), np.empty(shape), np.empty(shape, bool)
        for index in range(len(self.windows.ids)):
            for rows, logp_RV in _log_probabilities(self._logits(run, index)):
                dense_RV = self._logp_WTV[index, rows].to(logp_RV.device)
                nll_WT[index, rows] = _nll(logp_RV, self._targets(index)[rows])
                kl_WT[index, rows] = _kl(dense_RV, logp_RV)
                likeliest_R = logp_RV.argmax(-1).cpu().numpy()
                same_WT[index, rows] = likeliest_R == self._likeliest_WT[index, rows]
            progress()
        return Scores(nll_WT, kl_WT, same_WT)

    def _logits(self, run: Callable[[int], Tensor], index: int) -> Tensor:
        return run(index)[0, self.windows.first - 1 : -1]

    def _targets(self, index: int) -> Tensor:
        return self.windows.ids[index, self.windows.first :]


_CPU_ROWS = 4  # few enough that what is computed of them stays in the cache
_GPU_ROWS = 512


def _log_probabilities(logits_TV: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows of the text at a time, and their log probabilities, float32."""
    at_once = _CPU_ROWS if logits_TV.device.type == "cpu" else _GPU_ROWS
    for start in range(0, len(logits_TV), at_once):
        rows = slice(start, start + at_once)
        logp_RV = logits_TV[rows].to(torch.float32).log_softmax(-1)
        if bool(logp_RV.sum(-1).isnan().any()) and bool(logp_RV.isnan().any()):
            raise StudyError("its logits hold NaN or +Inf, so there is nothing to measure")
        yield rows, logp_RV


def _nll(logp_RV: Tensor, targets_R: Tensor) -> Floats:
    nll_R = -logp_RV.gather(1, targets_R.to(logp_RV.device)[:, None])[:, 0].cpu().double()
    if not bool(nll_R.isfinite().all()):
        raise StudyError("it gives a token of the text probability 0 (a logit of -Inf)")
    return nll_R.numpy()


def _kl(dense_RV: Tensor, logp_RV: Tensor) -> Floats:
    p_RV = dense_RV.exp()
    kl_R = (p_RV * (dense_RV - logp_RV)).sum(-1)
    if not bool(kl_R.isfinite().all()):
        # a token that the dense model rules out (a logit of -Inf) adds nothing
        kl_R = (p_RV * (dense_RV - logp_RV)).where(p_RV > 0, 0).sum(-1)
    if not bool(kl_R.isfinite().all()):
        raise StudyError("it rules out a token that the dense model does not (a logit of -Inf)")
    return kl_R.cpu().double().numpy()


def _allocate(folder: Path, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return room for float32, on an accelerator or mapped from a nameless file.

    The file's blocks are reserved: a full disk is an error now, not a crash later.
    """
    size = math.prod(shape) * 4
    if device.type != "cpu" and fits(size, device):
        return torch.empty(shape, device=device)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="dense-", suffix=".f32") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="w+", shape=shape))
    except OSError as error:
        raise StudyError(
            f"cannot keep the dense model's {size / 1e9:.1f} GB of log probabilities in {folder} "
            f"({error.strerror}): use fewer --tokens, or an --out folder with more room"
        ) from None
