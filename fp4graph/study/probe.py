"""A probe of what a model can do: multiple choice, answered by likelihood.

Perplexity that rises by 2 % can hide five points of a capability. A file has an object a line:

    {"context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}

A model's choice is the one whose tokens have the highest mean log probability after the context.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fp4graph import CorpusError
from fp4graph.files import read_lines
from fp4graph.study.evaluate import adds_bos

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Probe:
    """Questions, each choice a row of tokens, filled up behind to the length of a text's windows.

    Attributes:
        ids: token ids, int64 [rows, length].
        spans: first and last + 1 position of each row's choice.
        questions: which question each row belongs to, ascending.
        answers: number of the right choice, one a question.
    """

    ids: Tensor
    spans: tuple[tuple[int, int], ...]
    questions: tuple[int, ...]
    answers: tuple[int, ...]

    def choices(self, run: Callable[[int], Tensor], progress: Callable[[], None]) -> Integers:
        """Return which choice a model takes for each question.

        Args:
            run: number of a row to logits [1, length, vocab].
            progress: called once after each row.
        """
        scores: list[list[float]] = [[] for _ in self.answers]
        for row, ((start, end), question) in enumerate(
            zip(self.spans, self.questions, strict=True)
        ):
            logp_TV = run(row)[0, start - 1 : end - 1].to(torch.float32).log_softmax(-1)
            targets_T = self.ids[row, start:end].to(logp_TV.device)
            logp_T = logp_TV.gather(1, targets_T[:, None])[:, 0]
            scores[question].append(float(logp_T.cpu().double().mean()))
            progress()
        return np.array([int(np.argmax(each)) for each in scores])

    def digest(self) -> str:
        """Return a hash of all questions."""
        content = self.ids.numpy().tobytes() + repr((self.spans, self.answers)).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def accuracy(self, choices: Integers) -> float:
        """Return the share of questions whose choice is the answer."""
        return float((choices == np.array(self.answers)).mean())


def read_probe(path: Path, tokenizer: Any, length: int) -> Probe:
    """Read a file of questions.

    Args:
        path: JSON lines.
        tokenizer: of the model.
        length: tokens of a row; a question that does not fit is an error.

    Raises:
        CorpusError: the file cannot be read, or a line is no question; says which.
    """
    rows: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    questions: list[int] = []
    answers: list[int] = []
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    for number, line in _lines(path):
        context, choices, answer = _question(line, f"{path}, line {number}")
        before = bos + tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"]
        for choice in choices:
            own = tokenizer(choice, add_special_tokens=False, verbose=False)["input_ids"]
            ids = before + own
            if not before or not own or len(ids) > length:
                problem = "a context and a choice need tokens, and fit into --seq-len together"
                raise CorpusError(f"{path}, line {number}: {problem} ({len(ids)} of {length})")
            rows.append(ids + [ids[-1]] * (length - len(ids)))  # what comes behind is not seen
            spans.append((len(before), len(ids)))
            questions.append(len(answers))
        answers.append(answer)
    if not rows:
        raise CorpusError(f"{path} has no questions")
    return Probe(torch.tensor(rows, device="cpu"), tuple(spans), tuple(questions), tuple(answers))


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        return read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"cannot read the probe {path}: {error}") from None


def _question(line: str, where: str) -> tuple[str, list[str], int]:
    try:
        found = json.loads(line)
        context, choices, answer = found["context"], found["choices"], found["answer"]
        good = isinstance(context, str) and len(choices) > 1 and 0 <= answer < len(choices)
        good = good and all(isinstance(choice, str) for choice in choices)
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        expected = '{"context": text, "choices": [text, ...], "answer": number of the right one}'
        raise CorpusError(f"{where}: expected {expected}")
    return context, choices, int(answer)
