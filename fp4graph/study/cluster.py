"""Trials on a Ray cluster: workers load the model once each and take trials, the head keeps all.

A worker that dies gives its trial back, and another one takes its place. What has ended is in the
head's store at once, so that Ctrl-C and kill -9 lose the trials under way and no other.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections import Counter, deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fp4graph import OptionError, StudyError
from fp4graph.study.ablate import Ablation
from fp4graph.study.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fp4graph.models import LoadedModel
    from fp4graph.study.evaluate import Floats, Windows
    from fp4graph.study.probe import Probe
    from fp4graph.study.progress import Progress
    from fp4graph.study.trial import Row, Trial

_MOST_ATTEMPTS = 3  # that one trial may take its worker down with it
_LOG = logging.getLogger("fp4graph.ablate")


@dataclass(frozen=True)
class Where:
    """Where trials run.

    Attributes:
        on: `ray` for this machine or the cluster that RAY_ADDRESS names, or `ray://HOST:PORT`.
        workers: how many; None for one a GPU, or one a machine where there is none.
    """

    on: str
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.on != "ray" and not self.on.startswith("ray://"):
            raise OptionError(f"on={self.on!r}: expected ray, or ray://HOST:PORT")
        if self.workers is not None and self.workers < 1:
            raise OptionError(f"workers={self.workers}: expected 1 or more")


@dataclass(frozen=True)
class Job:
    """What every worker is given, once."""

    again: Callable[[], LoadedModel]
    windows: Windows
    probe: Probe | None
    about: dict[str, Any]
    plan: tuple[Trial, ...]

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        windows: Windows,
        probe: Probe | None,
        about: dict[str, Any],
        plan: Sequence[Trial],
    ) -> Job:
        """Return a job, if workers can do it.

        Raises:
            OptionError: the model cannot be loaded again, by its name; or a trial's cannot.
        """
        if loaded.again is None:
            raise OptionError("on a cluster each worker loads the model: give it by its name")
        if any(trial.packed is not None for trial in plan):
            raise OptionError("converted folders are measured here, without a cluster")
        return cls(loaded.again, windows, probe, about, tuple(plan))


@dataclass(frozen=True)
class _Answer:
    """What a worker measured, and by which key it is known there."""

    identity: dict[str, Any]
    row: Row
    kl: Floats
    said: list[str]


class _Worker:
    """Loads the model, and measures one trial after the other.

    It loads with the first trial: what fails then is that trial's error, and no dead worker.
    """

    def __init__(self, job: Job, threads: int) -> None:
        torch.set_num_threads(threads)
        self._scratch = tempfile.TemporaryDirectory(prefix="fp4graph-")
        self._store, self._job = Store(None), job

    @cached_property
    def _study(self) -> Ablation:
        job, folder = self._job, Path(self._scratch.name)
        return Ablation(job.again(), job.windows, self._store, folder, job.probe, job.about)

    def provenance(self) -> dict[str, Any]:
        return self._study.provenance()

    def run(self, place: int) -> _Answer:
        trial = self._job.plan[place]
        row = self._study.measure(trial)
        identity = self._study.key(trial)
        content = self._store.passages(identity["text"]).popitem()[1] if row.format else b""
        kl = np.frombuffer(content, "<f2").astype(np.float64)
        said = self._store.tokens(identity["text"])
        self._store.forget_passages()
        return _Answer(identity, row, kl, said)


def run_on_ray(
    study: Ablation,
    store: Store,
    job: Job,
    where: Where,
    progress: Progress,
    seconds: float = math.inf,
) -> Iterator[tuple[int, Row]]:
    """Yield the place of each trial in the plan with its row, in the order in which they end.

    Args:
        study: the head's own, which knows by which keys trials are kept.
        store: where results are kept and found again.
        job: the trials, and what workers need.
        where: the cluster.
        progress: is told how far it is.
        seconds: after so long no further trial is begun.

    Raises:
        OptionError: Ray is not installed.
        StudyError: the cluster cannot be reached; a worker loads another model by that name; a
            trial fails, or takes three workers down.
    """
    kept = {place: store.get(study.key(trial)) for place, trial in enumerate(job.plan)}
    missing = [place for place, row in kept.items() if row is None]
    progress.start(len(missing), "trials", len(job.plan), budget=seconds)
    for place, row in kept.items():
        if row is not None:
            trial = job.plan[place]
            if trial.name:
                store.name(study.key(trial), trial.name)
            progress.ended(str(trial), row, kept=True)
            yield place, replace(row, name=trial.name or row.name)
    if not missing:
        return
    runs: dict[int, int] = {}
    with ExitStack() as stack:
        ray = stack.enter_context(_connected(where.on))
        crew = stack.enter_context(_Crew(ray, job, where.workers, len(missing)))
        progress.note(f"{crew.size} workers of {crew.threads} threads on {where.on}")
        for worker, place, answer in crew.answers(missing, time.monotonic() + seconds):
            trial = job.plan[place]
            if answer.identity["model"] != study.identity["model"]:
                raise StudyError(f"a worker loads another model by the name that is given: {trial}")
            if worker not in runs:
                runs[worker] = store.begin(crew.provenance(worker))
            row = replace(answer.row, name=trial.name)
            if row.format:
                store.put_passage(answer.identity, answer.kl, answer.said)
            store.put(answer.identity, row, runs[worker])
            progress.advance()
            progress.ended(str(trial), row)
            yield place, row


class _Crew:
    """The workers of a job, and what each is doing."""

    def __init__(self, ray: Any, job: Job, workers: int | None, trials: int) -> None:
        self._ray = ray
        resources = ray.cluster_resources()
        cpus, self._gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        machines = sum(node["Alive"] for node in ray.nodes())
        self.size = min(workers or self._gpus or machines, trials)
        self.threads = max(1, cpus // self.size)
        self._plan = job.plan
        self._job = ray.put(job)
        self._workers = {number: self._new() for number in range(self.size)}
        self._facts: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *error: object) -> None:
        for (
            worker
        ) in self._workers.values():  # else an error's traceback keeps them, and their CPUs
            self._ray.kill(worker)

    def _new(self) -> Any:
        share = min(1.0, self._gpus / self.size) if self._gpus else 0
        actor = self._ray.remote(num_cpus=self.threads, num_gpus=share)(_Worker)
        return actor.remote(self._job, self.threads)

    def provenance(self, worker: int) -> dict[str, Any]:
        """Return what a worker says of itself and its machine."""
        facts: dict[str, Any] = self._ray.get(self._workers[worker].provenance.remote())
        return facts

    def answers(self, places: Sequence[int], until: float) -> Iterator[tuple[int, int, _Answer]]:
        """Yield who measured which trial, and what; the trials of the dead are given to others."""
        waiting, deaths = deque(places), Counter[int]()
        busy: dict[Any, tuple[int, int]] = {}
        idle = deque(self._workers)
        while True:
            while waiting and idle and time.monotonic() < until:
                worker, place = idle.popleft(), waiting.popleft()
                busy[self._workers[worker].run.remote(place)] = worker, place
            if not busy:
                return
            (ended, *_), _ = self._ray.wait(list(busy))
            worker, place = busy.pop(ended)
            try:
                answer = self._ray.get(ended)
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise (
                    cause
                    if isinstance(cause, StudyError)
                    else StudyError(f"{self._plan[place]}: {cause}")
                ) from None
            except self._ray.exceptions.RayActorError as error:
                deaths[place] += 1
                _LOG.warning("worker %d died, its trial is given to another: %s", worker, error)
                if deaths[place] == _MOST_ATTEMPTS:
                    raise StudyError(
                        f"{self._plan[place]}: {_MOST_ATTEMPTS} workers died of it; is there "
                        "memory for a model each? --workers says how many"
                    ) from None
                waiting.appendleft(place)
                self._workers[worker] = self._new()
            else:
                yield worker, place, answer
            idle.append(worker)


@contextmanager
def _connected(on: str) -> Iterator[Any]:
    """Yield ray, connected; what was connected before stays so."""
    try:
        import ray
    except ImportError:
        raise OptionError("a cluster needs a package: pip install 'fp4graph[ray]'") from None
    before = ray.is_initialized()
    address = None if on == "ray" else on
    if not before:
        options = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            options["include_dashboard"] = False
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise StudyError(f"cannot reach the cluster {on}: {error}") from None
    try:
        yield ray
    finally:
        if not before:
            ray.shutdown()
