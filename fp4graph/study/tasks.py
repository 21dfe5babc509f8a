"""Capabilities by lm-evaluation-harness's tasks: a model with FP4 in it beside its dense self."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

from fp4graph import Fp4GraphError, OptionError, StudyError, backend
from fp4graph.study.compiled import compiled, forward_replaced
from fp4graph.study.progress import SILENT
from fp4graph.study.statistics import draws
from fp4graph.study.trial import DENSE, OfTrial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fp4graph.models import LoadedModel
    from fp4graph.study.progress import Progress
    from fp4graph.study.trial import Direction, Trial

    Key = tuple[str, str, str]  # task, metric, filter
    Aggregate = Callable[[list[Any]], float]

QUESTIONS = Path(__file__).parent / "questions"
"""The project's own tasks: `fp4graph` is `fp4graph_choice` and `fp4graph_answers`."""
_RESAMPLES = 100  # as many as the harness itself takes for metrics of a whole corpus
_NO_METRIC = "bypass"  # the harness's name for a task that is run and not scored


@dataclass(frozen=True)
class TaskRow(OfTrial):
    """A trial on a task; the fields are the keys of the JSON lines.

    Attributes:
        selector: see `Trial`, and so are `format`, `activations`, `quantizer` and `direction`.
        task: of lm-evaluation-harness, or a group of tasks.
        metric: such as `acc`.
        filter: which of the task's ways to read an answer; `none` where it has just one.
        value: what the harness makes of all questions by the task's own rule; None if no number.
        difference: how far that is above the dense model's on the same questions.
        difference_se: standard error of the difference, questions being independent. It comes from
            paired differences where the rule is the mean, and from a paired bootstrap elsewhere. Of
            a group it comes from the harness's rule for groups. None where it cannot be told.
        questions: how many.
        note: what does not count and why; empty where everything does.
        name: what the user calls the trial; empty without a name.
    """

    selector: str
    format: str | None
    activations: str
    quantizer: str
    direction: Direction
    task: str
    metric: str
    filter: str
    value: float | None
    difference: float | None
    difference_se: float | None
    questions: int
    note: str = ""
    name: str = ""


@dataclass(frozen=True)
class _Answers:
    """What a model's answers to a task came to, by one metric and filter.

    Attributes:
        value: by the task's rule, None if that is no number.
        by_question: what each question came to: a number, or what a metric of the corpus needs.
        aggregate: the task's rule.
        questions: how many were asked.
    """

    value: float | None
    by_question: Mapping[int, Any]
    aggregate: Aggregate
    questions: int


_NONE = _Answers(None, {}, math.fsum, 0)


def evaluate_tasks(
    loaded: LoadedModel,
    plan: Sequence[Trial],
    tasks: Sequence[str],
    limit: int | None = None,
    include: Path | None = None,
    batch_size: int = 4,
    progress: Progress = SILENT,
) -> Iterator[TaskRow]:
    """Yield a row for each trial, task, metric and filter, the dense model's first.

    Tasks that generate call the model's own `generate`, whose every step runs the rewritten graph.

    Args:
        loaded: the model.
        plan: the trials.
        tasks: names that lm-evaluation-harness knows: tasks, groups, tags.
        limit: the first questions of each task alone.
        include: folder of further tasks.
        batch_size: questions at a time.
        progress: is told about each trial.

    Raises:
        OptionError: lm-evaluation-harness is not installed, or does not know a task.
        StudyError: the model's weights are random; a task's data cannot be had, or the harness
            fails; a call of the model did not run as selected.
    """
    if loaded.is_random:
        raise StudyError(f"{loaded.name} has random weights: its accuracy means nothing")
    harness = _Harness(loaded, tasks, limit, include, batch_size)
    todo = list(dict.fromkeys((DENSE, *plan)))
    progress.start(len(todo), "models")
    dense = harness.answers(DENSE)
    for trial in todo:
        found = dense if trial == DENSE else harness.answers(trial)
        keys = dict.fromkeys((*dense, *found))  # a metric may depend on what was answered
        rows = [_row(trial, key, found.get(key, _NONE), dense.get(key, _NONE)) for key in keys]
        progress.advance(str(trial))
        for row in (*rows, *harness.groups(trial, rows)):
            progress.ended(row.task, row)
            yield row


class _Harness:
    """The tasks, loaded once, and a model that answers them in FP4 or dense."""

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
        folders = [str(each) for each in (QUESTIONS, include) if each is not None]
        known: set[str] = set()
        for defaults in (False, True):  # reading its own thousands of tasks takes half a minute
            try:
                self._manager = TaskManager(include_path=folders, include_defaults=defaults)
            except Exception as error:  # a file in the folder that is no task
                raise _failed(f"the tasks in {include}", error) from None
            known = set(self._manager.all_tasks)
            if known.issuperset(tasks):
                break
        for task in tasks:
            if task not in known:
                raise OptionError(f"lm-evaluation-harness knows no task {task!r}")
        self._loaded, self._names = loaded, list(tasks)
        self._limit, self._batch_size = limit, batch_size
        self._tasks: list[Any] = []
        self._groups: dict[str, Any] = {}

    def answers(self, trial: Trial) -> dict[Key, _Answers]:
        """Return what a trial's model answers."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        torch._dynamo.reset()
        if trial.packed is not None:
            model = trial.packed.model
            forward = model.forward
        else:
            model = self._loaded.model
            made = backend(trial.policy, inner="eager", model=model)
            forward = compiled(model, made, dynamic=True)
        try:
            self._load()
            quiet = patch("lm_eval.evaluator.get_git_commit_hash")  # else git writes to stderr
            with forward_replaced(model, forward), quiet:
                lm = HFLM(
                    pretrained=model, tokenizer=self._loaded.tokenizer, backend="causal",
                    batch_size=self._batch_size,
                )  # fmt: skip
                results = lm_eval.simple_evaluate(
                    lm, tasks=self._tasks, limit=self._limit, task_manager=self._manager,
                    bootstrap_iters=0, log_samples=True,
                )  # fmt: skip
        except Fp4GraphError:
            raise
        except Exception as error:  # the harness, its tasks' own code and datasets raise anything
            raise _failed(f"{', '.join(self._names)}, {trial}", error) from None
        return _read(results, self._manager.load(self._tasks)["tasks"])

    def _load(self) -> None:
        if self._tasks:
            return
        for name in self._names:
            found = self._manager.load([name])
            self._groups.update(found["groups"])
            group = found["groups"].get(name)
            self._tasks += [group] if group else found["tasks"].values()

    def groups(self, trial: Trial, rows: Sequence[TaskRow]) -> Iterator[TaskRow]:
        """Yield the rows of groups of tasks that have a score of their own."""
        for group in self._groups.values():
            values = group.aggregate(_by_task(rows, "value"))
            differences = group.aggregate(_by_task(rows, "difference"))
            inside = {each.task_name for each in group.get_all_tasks()}
            for key, value in values.items():
                metric, comma, filter = key.partition(",")
                if not comma or metric.endswith("_stderr"):
                    continue
                error = differences.get(f"{metric}_stderr,{filter}")
                mine = (row for row in rows if (row.metric, row.filter) == (metric, filter))
                yield TaskRow(
                    **trial.facts,
                    task=group.name,
                    metric=metric,
                    filter=filter,
                    value=float(value),
                    difference=float(differences[key]),
                    difference_se=float(error) if _is_number(error) else None,
                    questions=sum(row.questions for row in mine if row.task in inside),
                    name=trial.name,
                )


def _failed(what: str, error: Exception) -> StudyError:
    reason = " ".join(str(error).split())[:300]
    return StudyError(f"lm-evaluation-harness, {what}: {type(error).__name__}: {reason}")


def _read(results: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[Key, _Answers]:
    """Return the answers of a run by task, metric and filter."""
    from lm_eval.api.metrics import mean

    found: dict[Key, _Answers] = {}
    for name, samples in results["samples"].items():
        by_key: dict[tuple[str, str], dict[int, Any]] = {}
        for sample in samples:
            for metric in sample["metrics"]:
                answers = by_key.setdefault((metric, sample["filter"]), {})
                answers[sample["doc_id"]] = sample[metric]
        questions = len({sample["doc_id"] for sample in samples})
        for (metric, filter), answers in by_key.items():
            value = results["results"][name].get(f"{metric},{filter}")
            known = _is_number(value) and metric != _NO_METRIC
            aggregate = tasks[name].aggregation().get(metric, mean)
            found[name, metric, filter] = _Answers(
                float(value) if known else None, answers, aggregate, questions
            )
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(float(value))


def _row(trial: Trial, key: Key, found: _Answers, dense: _Answers) -> TaskRow:
    task, metric, filter = key
    both = [number for number in dense.by_question if number in found.by_question]
    notes = []
    if found.value is None:
        notes.append(f"{metric} gives no number")
    asked = max(found.questions, dense.questions)
    if len(both) < asked:
        notes.append(f"{asked - len(both)} of {asked} questions have no value")
    difference = error = None
    if found.value is not None and dense.value is not None:
        difference = found.value - dense.value
        if found.by_question.keys() != dense.by_question.keys():
            ours, theirs = ([each.by_question[n] for n in both] for each in (found, dense))
            both_values = (found.aggregate(ours), dense.aggregate(theirs)) if both else ()
            difference = both_values[0] - both_values[1] if both_values else None
    if trial != DENSE and difference is not None:
        error = _error(found, dense, both)
    return TaskRow(
        **trial.facts,
        task=task,
        metric=metric,
        filter=filter,
        value=found.value,
        difference=difference,
        difference_se=error,
        questions=len(both),
        note="; ".join(notes),
        name=trial.name,
    )


def _error(found: _Answers, dense: _Answers, both: Sequence[int]) -> float | None:
    """Return the standard error of a difference over questions that both models answered."""
    from lm_eval.api.metrics import mean

    if len(both) < 2:
        return None
    ours = [found.by_question[number] for number in both]
    theirs = [dense.by_question[number] for number in both]
    if found.aggregate is mean and all(map(_is_number, (*ours, *theirs))):
        change = np.array(ours, float) - np.array(theirs, float)
        return float(change.std(ddof=1) / math.sqrt(len(change)))
    changes = []
    try:
        for picks in draws(len(both), _RESAMPLES):
            one, other = ([each[pick] for pick in picks] for each in (ours, theirs))
            changes.append(float(found.aggregate(one)) - float(found.aggregate(other)))
    except Exception:  # a rule that some draws have no answer for, such as those of one class alone
        return None
    return float(np.std(changes, ddof=1))


def _by_task(rows: Sequence[TaskRow], field: str) -> dict[str, Any]:
    """Return rows as the harness has them where it scores groups."""
    found: dict[str, Any] = {}
    for row in rows:
        value, error = getattr(row, field), row.difference_se
        metrics = found.setdefault(row.task, {"name": row.task, "sample_len": row.questions})
        metrics["alias"] = row.task
        metrics["sample_len"] = max(metrics["sample_len"], row.questions)
        if value is not None:
            metrics[f"{row.metric},{row.filter}"] = value
            metrics[f"{row.metric}_stderr,{row.filter}"] = "N/A" if error is None else error
    return found
