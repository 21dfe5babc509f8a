"""Trials on a Ray cluster: workers load the model once each and take trials, the head keeps all.

A worker that dies gives its trial back, and another one takes its place. What has ended is in the
head's store at once, so that Ctrl-C and kill -9 lose the trials under way and no other.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections import Counter, deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fp4graph import OptionError, StudyError
from fp4graph.study.ablate import Ablation
from fp4graph.study.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fp4graph.models import LoadedModel
    from fp4graph.study.evaluate import Windows
    from fp4graph.study.probe import Probe
    from fp4graph.study.progress import Progress
    from fp4graph.study.store import Passage
    from fp4graph.study.trial import Row, Trial

_MOST_ATTEMPTS = 3  # that one trial may take its worker down with it
_TOKEN = "one that wants a token wants RAY_AUTH_MODE=token here too"  # and answers nothing else
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
    device: str

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
        if loaded.device.index:
            raise OptionError(f"--device {loaded.device}: on a cluster each worker has its own GPU")
        return cls(loaded.again, windows, probe, about, tuple(plan), loaded.device.type)


class _Answer(NamedTuple):
    """What a worker measured, by which key it is known there, and what the worker is."""

    identity: dict[str, Any]
    row: Row
    passage: Passage | None
    facts: dict[str, Any]


class _Worker:
    """Loads the model, and measures one trial after the other.

    It loads with the first trial: what fails then is that trial's error, and no dead worker.
    """

    def __init__(self, job: Job, threads: int) -> None:
        torch.set_num_threads(threads)
        self._scratch = tempfile.TemporaryDirectory(prefix="fp4graph-")
        self._job = job

    @cached_property
    def _study(self) -> Ablation:
        job, folder = self._job, Path(self._scratch.name)
        return Ablation(job.again(), job.windows, Store(None), folder, job.probe, job.about)

    def ready(self) -> None:
        """Answer, as soon as there is a place for the worker."""

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return self._study.provenance()

    def run(self, place: int) -> _Answer:
        trial = self._job.plan[place]
        return _Answer(self._study.key(trial), *self._study.measure(trial), self._facts)


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
        OptionError: Ray is not installed; the cluster has no place for so many workers.
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
    runs: dict[str, int] = {}  # numbers, by what workers say of themselves
    with ExitStack() as stack:
        ray = stack.enter_context(_connected(where.on))
        crew = stack.enter_context(_Crew(ray, job, where.workers, len(missing)))
        progress.note(f"{crew.size} workers of {crew.threads} threads on {where.on}")
        for place, answer in crew.answers(missing, time.monotonic() + seconds):
            trial = job.plan[place]
            if answer.identity["model"] != study.identity["model"]:
                raise StudyError(f"a worker loads another model by the name that is given: {trial}")
            who = json.dumps(answer.facts, sort_keys=True)
            if who not in runs:
                runs[who] = store.begin(answer.facts)
            row = replace(answer.row, name=trial.name)
            store.put(answer.identity, row, runs[who], answer.passage)
            progress.advance()
            progress.ended(str(trial), row)
            yield place, row


class _Crew:
    """The workers of a job, and what each is doing."""

    def __init__(self, ray: Any, job: Job, workers: int | None, trials: int) -> None:
        self._ray, self._plan = ray, job.plan
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.size, self._share = _shares(machines, job.device, workers, trials)
        self.threads = int(self._share["num_cpus"])
        self._job = ray.put(job)
        self._workers = {number: self._new() for number in range(self.size)}

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers.values():
            self._ray.kill(worker)  # or the traceback of an error keeps it, and its processors

    def _new(self) -> Any:
        return self._ray.remote(**self._share)(_Worker).remote(self._job, self.threads)

    def answers(self, places: Sequence[int], until: float) -> Iterator[tuple[int, _Answer]]:
        """Yield what was measured of which trial; the trials of the dead are given to others.

        A worker that finds no place, or whose machine is gone for good, is not waited for.
        """
        waiting, deaths, idle = deque(places), Counter[int | None](), deque[int]()
        under_way: dict[Any, tuple[int, int | None]] = {
            each.ready.remote(): (worker, None) for worker, each in self._workers.items()
        }
        while True:
            while waiting and idle and time.monotonic() < until:
                worker, place = idle.popleft(), waiting.popleft()
                under_way[self._workers[worker].run.remote(place)] = worker, place
            more = waiting and time.monotonic() < until
            if not more and all(place is None for _, place in under_way.values()):
                return
            (ended, *_), _ = self._ray.wait(list(under_way))
            worker, begun = under_way.pop(ended)
            try:
                answer = self._ray.get(ended)
            except self._ray.exceptions.RayTaskError as error:
                raise self._failed(begun, error.cause) from None
            except self._ray.exceptions.RayActorError as error:
                _LOG.warning("worker %d died, its trial is given to another: %s", worker, error)
                deaths[begun] += 1
                if deaths[begun] == _MOST_ATTEMPTS:
                    problem = f"{_MOST_ATTEMPTS} workers died of it; is there memory for a model "
                    raise self._failed(begun, f"{problem}each? --workers says how many") from None
                if begun is not None:
                    waiting.appendleft(begun)
                self._workers[worker] = self._new()
                under_way[self._workers[worker].ready.remote()] = worker, None
            else:
                idle.append(worker)
                if begun is not None:
                    yield begun, answer

    def _failed(self, place: int | None, why: object) -> StudyError:
        if isinstance(why, StudyError):
            return why
        return StudyError(f"{'a worker' if place is None else self._plan[place]}: {why}")


def _shares(
    machines: Sequence[Mapping[str, float]], device: str, workers: int | None, trials: int
) -> tuple[int, dict[str, float]]:
    """Return how many workers there are, and what each asks its machine for.

    All ask for the same, as much as lets every one of them find a place.

    >>> _shares([{"CPU": 8}, {"CPU": 4}], "cpu", None, 100)
    (2, {'num_cpus': 4, 'num_gpus': 0})
    >>> _shares([{"CPU": 8, "GPU": 2}], "cuda", 3, 100)
    (3, {'num_cpus': 2, 'num_gpus': 0.5})

    Raises:
        OptionError: there is no place for so many.
    """
    cpus = [int(each.get("CPU", 0)) for each in machines]
    gpus = sum(int(each.get("GPU", 0)) for each in machines)
    if device == "cuda" and not gpus:
        raise OptionError("the model runs on a GPU, and the cluster has none: --device cpu")
    able = sum(count > 0 for count in cpus)
    size = min(workers or (gpus if device == "cuda" else able), trials)
    for threads in range(max(cpus, default=0), 0, -1):
        if sum(count // threads for count in cpus) >= size:
            of_a_gpu = 1 / math.ceil(size / gpus) if device == "cuda" else 0
            return size, {"num_cpus": threads, "num_gpus": of_a_gpu}
    raise OptionError(f"{size} workers are asked for, and the cluster has {sum(cpus)} processors")


@contextmanager
def _connected(on: str) -> Iterator[Any]:
    """Yield ray, connected; what was connected before stays so."""
    try:
        import ray
    except ImportError:
        raise OptionError("a cluster needs a package: pip install 'fp4graph[ray]'") from None
    before = ray.is_initialized()
    if not before:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if on != "ray":
            options["address"] = on
        elif not os.environ.get("RAY_ADDRESS"):
            options["include_dashboard"] = False  # of a cluster that is started here
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise StudyError(f"cannot reach the cluster {on}: {reason}; {_TOKEN}") from None
    try:
        yield ray
    finally:
        if not before:
            ray.shutdown()
