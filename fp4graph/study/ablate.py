"""Ablation: put some linears in FP4, or all but some, and measure the damage."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fp4graph import Policy, Report, Scheme, SelectorError, StudyError, TracedModel
from fp4graph.models import check_length
from fp4graph.study.evaluate import DenseReference, Scores, Windows, mean_and_error
from fp4graph.study.trial import DENSE, Row, Trial

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from fp4graph.models import LoadedModel
    from fp4graph.study.store import Store

PROTOCOL = 1
"""Raised when the meaning of a stored number changes, so that old ones are not mixed with new."""


class Progress(Protocol):
    """Is told how far a run is."""

    def start(self, total: int) -> None:
        """A run of `total` window evaluations begins."""

    def advance(self) -> None:
        """One window was evaluated."""

    def trial(self, trial: Trial, row: Row, *, cached: bool) -> None:
        """A trial ended, or was found in the store."""


class Ablation:
    """A model, a text and a store: runs trials, each once.

    Args:
        loaded: the model.
        windows: the text.
        store: where results are kept and found again.
        scratch: folder for the dense model's log probabilities while trials run.

    Raises:
        StudyError: the model's weights are random.
        ModelError: a window is longer than the model's positions.
    """

    def __init__(self, loaded: LoadedModel, windows: Windows, store: Store, scratch: Path) -> None:
        if loaded.is_random:
            raise StudyError(f"{loaded.name} has random weights: its accuracy means nothing")
        check_length(loaded.model, windows.ids.shape[1])
        self._loaded = loaded
        self._windows = windows
        self._store = store
        self._scratch = scratch
        self._traced = TracedModel(loaded.model)
        self._identity = {
            "protocol": PROTOCOL,
            "model": loaded.revision(),
            "dtype": str(next(loaded.model.parameters()).dtype),
            "text": windows.digest(),
            "fp4graph": version("fp4graph"),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }
        with torch.no_grad():
            self._logits(windows.ids[:1])

    def report(self, selector: str = "all") -> Report:
        """Say which linears a selector picks in this model."""
        return self._traced.plan(Policy.of(selector, Scheme.of()))

    def check(self, plan: Sequence[Trial]) -> None:
        """Check every trial against the model before the first one is run.

        Raises:
            SelectorError: a selector does not fit the model.
        """
        tags = self._traced.tags
        for trial in plan:
            policy = trial.policy()
            if policy is None:
                continue
            policy.check(tags)
            if not any(policy.decide(tag).scheme for tag in tags):
                raise SelectorError(trial.selector, "leaves no linear in FP4 to measure")

    def run(self, plan: Sequence[Trial], progress: Progress) -> Iterator[Row]:
        """Yield one row a trial, in order, running those that the store does not have.

        Raises:
            StudyError: the store or the scratch file cannot be written; nothing that was
                computed before is lost.
        """
        known = {trial: self._store.get(self._key(trial)) for trial in plan}
        missing = [trial for trial in plan if known[trial] is None]
        rest = len([trial for trial in missing if trial != DENSE])
        progress.start((rest + bool(missing)) * len(self._windows.ids))
        reference: DenseReference | None = None
        for trial in plan:
            result = known[trial]
            if result is None:
                try:
                    reference = reference or self._reference(progress)
                except StudyError as error:
                    raise StudyError(f"{DENSE}: {error}") from None
                try:
                    result = self._measure(trial, reference, progress)
                except StudyError as error:
                    raise StudyError(f"{trial}: {error}") from None
                self._store.put(self._key(trial), result)
            row = Row(**result)
            progress.trial(trial, row, cached=known[trial] is not None)
            yield row

    def _reference(self, progress: Progress) -> DenseReference:
        self._traced.select(None)
        return DenseReference(self._logits, self._windows, self._scratch, progress.advance)

    def provenance(self) -> dict[str, Any]:
        """Return everything that the numbers hang on, and where they were measured."""
        return {
            **self._identity,
            "model_name": self._loaded.name,
            "windows": len(self._windows.ids),
            "scored_tokens": len(self._windows.ids) * self._windows.scored,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "command": sys.argv,
        }

    def _key(self, trial: Trial) -> dict[str, Any]:
        return {**self._identity, **asdict(trial)}

    @torch.no_grad()
    def _logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._traced(input_ids=ids, use_cache=False).logits
        return logits

    def _measure(
        self, trial: Trial, reference: DenseReference, progress: Progress
    ) -> dict[str, Any]:
        if trial == DENSE:
            return asdict(_row(trial, reference.scores, reference.scores, Report()))
        with torch.no_grad():
            report = self._traced.select(trial.policy())
        if not report.selected:
            raise StudyError("no linear was rewritten")
        scores = reference.score(self._logits, progress.advance)
        return asdict(_row(trial, scores, reference.scores, report))


def _row(trial: Trial, scores: Scores, dense: Scores, report: Report) -> Row:
    dnll, dnll_se = mean_and_error(scores.nll - dense.nll, scores.tokens)
    kl, kl_se = mean_and_error(scores.kl, scores.tokens)
    rows = report.selected
    bytes_dense = sum(row.bytes_dense for row in rows)
    bytes_packed = sum(row.bytes_packed or 0 for row in rows)
    saved = (bytes_dense - bytes_packed) / 1e6
    return Row(
        selector=trial.selector,
        format=trial.format,
        activations=trial.activations,
        quantizer=trial.quantizer,
        direction=trial.direction,
        ppl=scores.perplexity,
        dnll=dnll,
        dnll_se=dnll_se,
        kl=kl,
        kl_se=kl_se,
        top1=float(scores.top1.sum()) / (len(scores.top1) * scores.tokens),
        linears=len(rows),
        parameters=sum(row.parameters for row in rows),
        bytes_dense=bytes_dense,
        bytes_packed=bytes_packed,
        dnll_per_mb=dnll / saved if saved > 0 else None,
    )


def write_json_lines(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSON lines, the whole file at once, so that a reader never sees half of it."""
    draft = path.with_suffix(".partial")
    draft.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    draft.replace(path)
