"""Capabilities by lm-evaluation-harness's tasks: a model with FP4 in it beside its dense self."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fp4graph import OptionError, StudyError, backend
from fp4graph.study.trial import DENSE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import nn

    from fp4graph.models import LoadedModel
    from fp4graph.study.trial import Direction, Trial

    Answers = dict[tuple[str, str], dict[int, float]]


@dataclass(frozen=True)
class TaskRow:
    """A trial on a task; the fields are the keys of the JSON lines.

    Attributes:
        selector: see `Trial`, and so are `format`, `activations`, `quantizer` and `direction`.
        task: of lm-evaluation-harness.
        metric: one that each question has, such as `acc`.
        value: its mean.
        difference: how far that is above the dense model's on the same questions.
        difference_se: standard error of the difference, questions being independent.
        questions: how many.
    """

    selector: str
    format: str | None
    activations: str
    quantizer: str
    direction: Direction
    task: str
    metric: str
    value: float
    difference: float
    difference_se: float | None
    questions: int


def evaluate_tasks(
    loaded: LoadedModel,
    plan: Sequence[Trial],
    tasks: Sequence[str],
    limit: int | None = None,
    include: Path | None = None,
    batch_size: int = 4,
) -> Iterator[TaskRow]:
    """Yield a row for each trial, task and metric, the dense model's first.

    Args:
        loaded: the model.
        plan: trials whose codes need no calibration.
        tasks: names that lm-evaluation-harness knows.
        limit: the first questions of each task alone.
        include: folder of further tasks.
        batch_size: questions at a time.

    Raises:
        OptionError: lm-evaluation-harness is not installed, or does not know a task.
        StudyError: the model's weights are random, or a task's data cannot be had.
    """
    if loaded.is_random:
        raise StudyError(f"{loaded.name} has random weights: its accuracy means nothing")
    harness = _Harness(loaded, tasks, limit, include, batch_size)
    dense = harness.answers(DENSE)
    for trial in dict.fromkeys((DENSE, *plan)):
        found = dense if trial == DENSE else harness.answers(trial)
        for (task, metric), answers in found.items():
            yield _row(trial, task, metric, answers, dense[task, metric])


class _Harness:
    def __init__(
        self,
        loaded: LoadedModel,
        tasks: Sequence[str],
        limit: int | None,
        include: Path | None,
        batch_size: int,
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise OptionError(
                "lm-evaluation-harness is needed: pip install 'fp4graph[eval]'"
            ) from None
        self._manager = TaskManager(include_path=None if include is None else str(include))
        known = set(self._manager.all_tasks)
        for task in tasks:
            if task not in known:
                raise OptionError(f"lm-evaluation-harness knows no task {task!r}")
        self._loaded, self._tasks = loaded, list(tasks)
        self._limit, self._batch_size = limit, batch_size

    def answers(self, trial: Trial) -> Answers:
        """Return what every question came to, by task and metric."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        torch._dynamo.reset()
        model = HFLM(
            pretrained=_compiled(self._loaded.model, trial),
            tokenizer=self._loaded.tokenizer,
            backend="causal",
            batch_size=self._batch_size,
        )
        try:
            results = lm_eval.simple_evaluate(
                model, tasks=self._tasks, limit=self._limit, task_manager=self._manager,
                bootstrap_iters=0, log_samples=True,
            )  # fmt: skip
        except (OSError, ConnectionError) as error:
            raise StudyError(f"the data of {', '.join(self._tasks)}: {error}") from None
        found: Answers = defaultdict(dict)
        for task, samples in results["samples"].items():
            for sample in samples:
                for metric in sample["metrics"]:
                    value = sample[metric]
                    if isinstance(value, int | float | bool | np.number):
                        found[task, metric][sample["doc_id"]] = float(value)
        return dict(found)


def _compiled(model: nn.Module, trial: Trial) -> Any:
    """Return the model with what a trial has in FP4; questions are of all lengths."""
    if trial == DENSE:
        return model
    select: Any = trial.selector
    if trial.direction == "except":
        select = {"all": {}, trial.selector: None}
    activations = None if trial.activations == "none" else trial.activations
    found = backend(
        select,
        format=trial.format or "nvfp4",
        quantizer=trial.quantizer,
        activations=activations,
        inner="eager",
        model=model,
    )
    return torch.compile(model, backend=found, dynamic=True)


def _row(
    trial: Trial, task: str, metric: str, answers: dict[int, float], dense: dict[int, float]
) -> TaskRow:
    values = np.array([answers[number] for number in dense])
    change = values - np.array(list(dense.values()))
    error = float(change.std(ddof=1) / math.sqrt(len(change))) if len(change) > 1 else None
    return TaskRow(
        selector=trial.selector,
        format=trial.format,
        activations=trial.activations,
        quantizer=trial.quantizer,
        direction=trial.direction,
        task=task,
        metric=metric,
        value=float(values.mean()),
        difference=float(change.mean()),
        difference_se=error,
        questions=len(values),
    )
