"""Ablation: put some linears in FP4, or all but some, and measure the damage."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from fp4graph import (
    Activations,
    OptionError,
    Policy,
    Replay,
    Report,
    Scheme,
    SelectorError,
    StreamedReplay,
    StudyError,
    TracedModel,
    report_of,
)
from fp4graph.fingerprint import fingerprint
from fp4graph.machine import processor
from fp4graph.models import check_length
from fp4graph.passes.base import skipped
from fp4graph.study.evaluate import DenseReference, Windows
from fp4graph.study.forecast import Forecast, share
from fp4graph.study.progress import SILENT
from fp4graph.study.scored import row_of
from fp4graph.study.statistics import halves
from fp4graph.study.store import Passage
from fp4graph.study.trial import DENSE, Row, Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from fp4graph.models import LoadedModel
    from fp4graph.study.probe import Integers, Probe
    from fp4graph.study.progress import Progress
    from fp4graph.study.store import Store

PROTOCOL = 2
"""Raised when the meaning of a stored number changes, so that old ones are not mixed with new."""

_PASSAGE = 256  # tokens whose KL is kept one by one


class Ablation:
    """A model, a text and a store: runs trials, each once.

    Args:
        loaded: the model.
        windows: the text.
        store: where results are kept and found again.
        scratch: folder for the dense model's log probabilities while trials run.
        probe: questions, rows as long as the windows.
        about: what to write down of the run beside what this class knows: the corpus's name.

    Raises:
        StudyError: the model's weights are random, or `FP4GRAPH_SKIP` leaves out passes.
        ModelError: a window is longer than the model's positions.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        windows: Windows,
        store: Store,
        scratch: Path,
        probe: Probe | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if loaded.is_random:
            raise StudyError(f"{loaded.name} has random weights: its accuracy means nothing")
        if skipped():
            raise StudyError("FP4GRAPH_SKIP leaves out passes, so nothing is measured: unset it")
        check_length(loaded.model, windows.ids.shape[1])
        self._loaded = loaded
        self._windows = windows
        self._store = store
        self._scratch = scratch
        self._probe = probe
        self._about = dict(about or {})
        self._rows = windows.ids if probe is None else torch.cat((windows.ids, probe.ids))
        self._traced = TracedModel(loaded.model)
        self._identity = {
            "protocol": PROTOCOL,
            "model": loaded.revision(),
            "dtype": str(next(loaded.model.parameters()).dtype),
            "text": windows.digest(),
            "fp4graph": version("fp4graph"),
            "torch": version("torch"),
            "transformers": version("transformers"),
            **({} if probe is None else {"probe": probe.digest()}),
            **({} if loaded.device.type == "cpu" else {"device": loaded.device.type}),
        }
        with torch.no_grad():
            self._traced.settle(**self._inputs(0))
        start = time.perf_counter()
        logits = self._logits(0)[0]
        self._keys: dict[Trial, dict[str, Any]] = {}
        self._arithmetic = f"{fingerprint(logits) % 2**64:016x}"
        self._window_s = time.perf_counter() - start
        self._vocabulary = logits.shape[-1]
        self._replay = self._new_replay()
        self._held: _Dense | None = None  # what `measure` compares with

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
            if trial == DENSE:
                continue
            policy = trial.policy
            policy.check(tags)
            if not any(policy.decide(tag).scheme for tag in tags):
                raise SelectorError(trial.select.text, "leaves no linear in FP4 to measure")

    def sizes(self, plan: Sequence[Trial]) -> dict[Trial, int]:
        """Return how many linears each trial's selector picks; of the dense model, most."""
        tags = self._traced.tags
        found = {DENSE: len(tags) + 1}
        for trial in plan:
            if trial != DENSE:
                found[trial] = sum(trial.select.decide(tag).scheme is not None for tag in tags)
        return found

    def forecast(self, plan: Sequence[Trial]) -> Forecast:
        """Say what a run will take, from the time of one window and where trials begin."""
        missing = [trial for trial in plan if self._store.get(self.key(trial)) is None]
        whole = self._window_s * len(self._rows)
        in_part = self._replay.refusal is None
        seconds = (whole * (share(trial, self._traced.tags) if in_part else 1) for trial in missing)
        tokens = len(self._windows.ids) * self._windows.scored
        logits = tokens * self._vocabulary * torch.float32.itemsize
        packed: Counter[int | None] = Counter()
        streamed = self._loaded.streamed
        for row in self.report():
            packed[row.block if streamed else None] += row.bytes_packed or 0
        dense = sum(each.nbytes for each in self._loaded.model.parameters())
        sizes = logits, dense, max(packed.values(), default=0), streamed
        return Forecast(len(plan), len(self._windows.ids), tuple(seconds), *sizes)

    def run(
        self, plan: Sequence[Trial], progress: Progress = SILENT, seconds: float = math.inf
    ) -> Iterator[Row]:
        """Yield one row a trial, in order, running those that the store does not have.

        Args:
            plan: the trials.
            progress: is told how far it is.
            seconds: after so long no further trial is begun, but always one; what the store has is
                still yielded.

        Raises:
            StudyError: the store or the scratch file cannot be written; nothing that was
                computed before is lost.
        """
        known = {trial: self._store.get(self.key(trial)) for trial in plan}
        missing = [trial for trial in plan if known[trial] is None]
        rest = len([trial for trial in missing if trial != DENSE])
        steps = (rest + bool(missing)) * len(self._rows)
        progress.start(steps, "trials", len(plan), budget=seconds)
        number = self._store.begin(self.provenance()) if missing else None
        reference: _Dense | None = None
        start = time.monotonic()
        for trial in plan:
            result = known[trial]
            if trial.name:
                self._store.name(self.key(trial), trial.name)
            if result is None and reference and time.monotonic() - start > seconds:
                continue
            if result is None:
                try:
                    reference = reference or self._reference(progress)
                except StudyError as error:
                    raise StudyError(f"{DENSE}: {error}") from None
                try:
                    result, passage = self._measure(trial, reference, progress)
                except StudyError as error:
                    raise StudyError(f"{trial}: {error}") from None
                self._store.put(self.key(trial), result, number, passage)
            result = replace(result, name=trial.name or result.name)
            progress.ended(str(trial), result, kept=known[trial] is not None)
            yield result

    def measure(self, trial: Trial) -> tuple[Row, Passage | None]:
        """Measure one trial and keep nothing; the dense model is run for the first one.

        Raises:
            StudyError: it fails.
        """
        try:
            self._held = self._held or self._reference(SILENT)
            return self._measure(trial, self._held, SILENT)
        except StudyError as error:
            raise StudyError(f"{trial}: {error}") from None

    @property
    def whole_because(self) -> str | None:
        """Why every trial runs the whole model, and not only what comes after its first change."""
        return self._replay.refusal

    def _new_replay(self, progress: Progress = SILENT) -> Replay:
        inputs = [self._inputs(index) for index in range(len(self._rows))]
        if not self._loaded.streamed:
            return Replay(self._traced, lambda out: out.logits, inputs)

        def told(part: int, parts: int) -> None:
            progress.within(f"part {part} of {parts}, all windows")

        return StreamedReplay(self._traced, lambda out: out.logits, inputs, self._scratch, told)

    def _reference(self, progress: Progress) -> _Dense:
        self._replay = self._new_replay(progress)  # which keeps the values of one run

        def run(index: int) -> Tensor:
            return self._replay.dense(index)

        reference = DenseReference(run, self._windows, self._scratch, progress.advance)
        return _Dense(reference, self._answer(run, progress))

    def _answer(self, run: Callable[[int], Tensor], progress: Progress) -> Integers | None:
        """Return a model's choices, of which rows come after those of the text."""
        if self._probe is None:
            return None
        start = len(self._windows.ids)
        return self._probe.choices(lambda row: run(start + row), progress.advance)

    def provenance(self) -> dict[str, Any]:
        """Return everything that the numbers depend on, and where they were measured."""
        return {
            **self._identity,
            "arithmetic": self._arithmetic,
            "model_name": self._loaded.name,
            "corpus": "",
            "windows": len(self._windows.ids),
            "seq_len": self._windows.ids.shape[1],
            "scored_tokens": len(self._windows.ids) * self._windows.scored,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "machine": processor(),
            "threads": torch.get_num_threads(),
            "command": sys.argv,
            **self._about,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What all trials of this model and text have in common in the store."""
        return self._identity

    def key(self, trial: Trial) -> dict[str, Any]:
        """Return what a trial is known by in the store."""
        if trial not in self._keys:
            self._keys[trial] = self._new_key(trial)
        return self._keys[trial]

    def _new_key(self, trial: Trial) -> dict[str, Any]:
        facts, schemes = trial.facts, trial.select.schemes
        if trial.packed is not None:
            return {**self._identity, **facts, "packed": trial.packed.revision()}
        found = dict.fromkeys(each.calibration.digest() for each in schemes if each.calibration)
        codes = {"calibration": ",".join(found)} if found else {}
        # where activations are rounded, last digits decide which way, and that adds up
        rounds = any(each.activations is not Activations.NONE for each in schemes)
        rounded: dict[str, Any] = {"arithmetic": self._arithmetic} if rounds else {}
        if any(each.activations is Activations.AUTO for each in schemes):
            raise OptionError(
                "activations 'auto' are exact or of 8 bits by the number of rows, as this machine "
                "likes it: measure 'none' and 'int8'"
            )
        if any(each.activations is Activations.INT8 for each in schemes):  # how is up to the kernel
            rows = self._traced.plan(trial.policy).selected
            rounded["kernels"] = sorted({row.kernel for row in rows if row.kernel})
        return {**self._identity, **facts, **codes, **rounded}

    def _inputs(self, index: int) -> dict[str, Any]:
        ids = self._rows[index : index + 1].to(self._loaded.device)
        return {"input_ids": ids, "use_cache": False}

    @torch.no_grad()
    def _logits(self, index: int) -> Tensor:
        logits: Tensor = self._traced(**self._inputs(index)).logits
        return logits

    @torch.no_grad()
    def _measure(
        self, trial: Trial, dense: _Dense, progress: Progress
    ) -> tuple[Row, Passage | None]:
        reference = dense.reference
        if trial == DENSE:
            row = row_of(trial, reference.scores, reference.scores, Report())
            noise, noise_se = halves(reference.scores.nll)
            row = replace(row, noise=noise, noise_se=noise_se)
            return self._probed(row, dense.choices, dense.choices), None
        report, run = self._ready(trial)
        if not report.selected:
            raise StudyError("no linear was rewritten")
        scores = reference.score(run, progress.advance)
        row = row_of(trial, scores, reference.scores, report)
        row = self._probed(row, self._answer(run, progress), dense.choices)
        return row, Passage(scores.kl[0, :_PASSAGE], self._passage_tokens)

    def _ready(self, trial: Trial) -> tuple[Report, Callable[[int], Tensor]]:
        """Return which linears a trial has in FP4, and what runs it on a window."""
        if trial.packed is not None:
            model = trial.packed.model
            return report_of(model), lambda index: model(**self._inputs(index)).logits
        if self._replay.refusal is None:
            return self._replay.select(trial.policy, trial.base), self._replay.run
        return self._traced.select(trial.policy), self._logits

    @cached_property
    def _passage_tokens(self) -> list[str]:
        ids = self._windows.ids[0, self._windows.first :][:_PASSAGE].tolist()
        tokenizer = self._loaded.tokenizer
        return [str(each) if tokenizer is None else tokenizer.decode([each]) for each in ids]

    def _probed(self, row: Row, choices: Integers | None, dense: Integers | None) -> Row:
        if self._probe is None or choices is None or dense is None:
            return row
        same = float((choices == dense).mean())
        return replace(row, probe=self._probe.accuracy(choices), probe_same=same)


@dataclass(frozen=True)
class _Dense:
    """What the dense model gave: its log probabilities, its choices in the probe."""

    reference: DenseReference
    choices: Integers | None
