"""The studies as functions, of a model in memory or by name; the commands are these."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp4graph import OptionError, TracedModel
from fp4graph.study import results, scores, verdicts, views
from fp4graph.study.cluster import Where
from fp4graph.study.given import (
    in_evaluation,
    packed_trials,
    plan_of,
    read_calibrations,
    selects_of,
    texts_of,
    title_of,
    windows_of,
)
from fp4graph.study.latency import Variant, measure, mode_for
from fp4graph.study.measured import measured
from fp4graph.study.outliers import outliers as measure_outliers
from fp4graph.study.plan import Group, converted, read_plan
from fp4graph.study.progress import shown
from fp4graph.study.run import run_trials
from fp4graph.study.sensitivity import Sensitivity, schemes_of
from fp4graph.study.table import Table
from fp4graph.study.tasks import evaluate_tasks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fp4graph.models import LoadedModel
    from fp4graph.study.evaluate import Windows
    from fp4graph.study.given import Calibrations, Packed, Selects, Texts
    from fp4graph.study.probe import Probe
    from fp4graph.study.progress import Progress


def ablate(
    model: nn.Module | LoadedModel,
    tokens: Tensor | Windows,
    select: Selects = (),
    format: Texts = (),
    activations: Texts = "none",
    quantizer: Texts = (),
    out: Path | str | None = None,
    *,
    by: Texts = (),
    plan: str = "",
    name: Texts = (),
    direction: str = "only",
    calibration: Calibrations = (),
    probe: Probe | None = None,
    budget: float | None = None,
    corpus: str = "",
    packed: Packed = (),
    on: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Table:
    """Measure what FP4 does to a model's predictions, selection by selection.

    Args:
        model: a causal language model of transformers, or one that `fp4graph.models.load` loaded.
        tokens: token ids, int64 [windows, length]; each window is scored alone, but for its first
            token, which is context.
        select: selectors, or mixes: mappings as `backend` takes them. Without `select`, `by`,
            `plan` and `packed` there is one trial a role.
        format: formats of the weights; `nvfp4`, or what the calibrations are for.
        activations: `none` (W4A16), `same` (W4A4), `int8` (W4A8).
        quantizer: how codes are found; `rtn`, or what the calibrations were made with.
        out: folder where results are kept and found again, with tables and a picture; None: nothing
            is kept.
        by: one trial for each `role`, `block`, or `role,block`.
        plan: `roles`, `blocks`, `grid`, `paper`, or a .toml file.
        name: what the first of `select` are called.
        direction: FP4 in the selection `only`, everywhere `except` in it, or `both`.
        calibration: codes found with data, or their files.
        probe: questions, see `fp4graph.study.probe.read_probe`.
        budget: seconds after which no further trial is begun; those that tell most come first.
        corpus: what the text is called in tables.
        packed: models that `fp4graph.convert` or `load` made, to be measured as they are, against
            `model`, which is dense.
        on: `ray` or `ray://HOST:PORT` runs trials on a cluster, each worker with a model of its
            own, loaded by its name.
        workers: how many; one a GPU, or one a machine, by default.
        progress: is told how far it is; None shows it where this runs.

    Returns:
        a row for each trial (`fp4graph.study.trial.Row`), the dense model's first.

    Raises:
        OptionError: a value that does not exist; more than one of `select`, `by` and `plan`.
        SelectorError: a selector that cannot be parsed, or matches nothing.
        CorpusError: tokens that the model cannot take.
        ModelError: a window is longer than the model's positions.
        StudyError: the model's weights are random; results cannot be written.
    """
    options: dict[str, Any] = {
        "format": texts_of(format),
        "activations": texts_of(activations),
        "quantizer": texts_of(quantizer),
        "direction": direction,
    }
    if plan:
        if select or by:
            raise OptionError("give select, by or plan, just one")
        given = {
            key: value for key, value in options.items() if value not in ((), ("none",), "only")
        }
        groups = read_plan(plan, given)
    elif packed and not (select or by):
        groups = ()
    else:
        by = texts_of(by) if by or select else ("role",)
        groups = (Group(selects_of(select), by, texts_of(name), **options),)
    codes = read_calibrations(calibration)
    combinations = [group.read(codes) for group in groups]
    combinations += [converted(packed_trials(packed))] if packed else []
    with shown(progress) as told, in_evaluation(model) as loaded:
        windows = windows_of(loaded, tokens)
        return run_trials(
            *(loaded, windows, combinations, out, told),
            probe=probe,
            budget=budget,
            corpus=corpus,
            where=None if on is None else Where(on, workers),
        )


def sensitivity(
    model: nn.Module | LoadedModel,
    tokens: Tensor | Windows,
    format: Texts = "nvfp4",
    activations: Texts = "none",
    quantizer: str = "rtn",
    *,
    samples: int = 2,
    against: Path | str | None = None,
    corpus: str = "",
    progress: Progress | None = None,
) -> Table:
    """Score a model's block linears by what FP4 in them will cost, without trying each.

    Args:
        model: as in `ablate`.
        tokens: as in `ablate`; short windows give more samples.
        format: formats of the weights.
        activations: `none` (W4A16), `same` (W4A4).
        quantizer: how codes are found; one that needs no data.
        samples: random backward passes a window.
        against: a folder of `ablate` with trials of single linears: says how well scores tell them.
        corpus: what the text is called in tables.
        progress: is told how far it is; None shows it where this runs.

    Returns:
        a row for each linear and scheme (`fp4graph.study.sensitivity.SensitivityRow`).

    Raises:
        as `fp4graph.study.sensitivity.Sensitivity`; and StudyError: no results in `against`.
    """
    schemes = schemes_of(texts_of(format), texts_of(activations), quantizer)
    store = None if against is None else results.open_results(Path(against))
    with shown(progress) as told, in_evaluation(model) as loaded:
        windows = windows_of(loaded, tokens)
        told.start(len(windows.ids), "windows")
        found = Sensitivity(loaded, windows, schemes, samples, told.advance)
        settings = [] if store is None else measured(store, loaded.revision(), found.tags)
        title = title_of(loaded, windows, corpus)
    return scores.sensitivity_table(found, settings, title, compared=store is not None)


def outliers(
    model: nn.Module | LoadedModel,
    tokens: Tensor | Windows,
    *,
    against: Path | str | None = None,
    corpus: str = "",
    progress: Progress | None = None,
) -> Table:
    """Measure how far the values of linears' inputs and weights reach (2603.08747, Table 1).

    Args:
        model: as in `ablate`.
        tokens: as in `ablate`.
        against: a folder of `ablate` with trials of single linears: says how outliers go with them.
        corpus: what the text is called in tables.
        progress: is told how far it is; None shows it where this runs.

    Returns:
        a row for each linear (`fp4graph.study.outliers.OutlierRow`).

    Raises:
        ModelError: a window is longer than the model's positions.
        StudyError: the model hides its linears inside higher-order ops; no results in `against`.
    """
    store = None if against is None else results.open_results(Path(against))
    with shown(progress) as told, in_evaluation(model) as loaded:
        windows = windows_of(loaded, tokens)
        told.start(len(windows.ids), "windows")
        found = measure_outliers(loaded, windows, told.advance)
        settings = [] if store is None else measured(store, loaded.revision(), list(found))
        title = title_of(loaded, windows, corpus)
    return scores.outliers_table(list(found.values()), settings, title, compared=store is not None)


def additivity(model: nn.Module | LoadedModel, out: Path | str) -> Table:
    """Say whether damages add up: sets against the sums of their linears, pairs against both alone.

    Args:
        model: as in `ablate`.
        out: a folder of `ablate` that has trials of single linears and of sets of them.

    Returns:
        a row for each set (`fp4graph.study.additivity.SetRow`); tables of pairs belong to it.

    Raises:
        StudyError: no results, or none that can be compared; says which are lacking.
    """
    store = results.open_results(Path(out))
    with in_evaluation(model) as loaded:
        traced = TracedModel(loaded.model)
        with torch.no_grad():
            ids = torch.zeros(1, 8, dtype=torch.int64, device=loaded.device)
            traced(input_ids=ids, use_cache=False)
        found = measured(store, loaded.revision(), traced.tags)
    return scores.additivity_table(found, loaded.name)


def latency(
    model: nn.Module | LoadedModel,
    select: Selects | None = None,
    format: Texts = (),
    activations: Texts = "none",
    quantizer: Texts = (),
    *,
    name: Texts = (),
    calibration: Calibrations = (),
    packed: Packed = (),
    inner: str = "inductor",
    mode: str | None = None,
    attention: str | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    rounds: int = 5,
    memory: bool = True,
    progress: Progress | None = None,
) -> Table:
    """Time greedy generation, dense and with each selection in FP4, in alternation.

    Args:
        model: as in `ablate`; its weights may be random.
        select: as in `ablate`; None is `all`, or nothing where there is `packed`.
        format: as in `ablate`.
        activations: as in `ablate`.
        quantizer: as in `ablate`.
        name: as in `ablate`.
        calibration: as in `ablate`.
        packed: as in `ablate`.
        inner: `inductor` or `eager`.
        mode: of torch.compile, for Inductor; None is `reduce-overhead` (CUDA graphs) on GPUs, and
            `default` elsewhere.
        attention: transformers' `attn_implementation`; None leaves the model's.
        prompt_tokens: length of the prompt.
        new_tokens: tokens to generate, at least 2.
        rounds: how many times each variant generates.
        memory: whether to load a model that has a name once more for each variant, to measure it.
        progress: is told how far it is; None shows it where this runs.

    Returns:
        a row for each variant (`fp4graph.study.latency.LatencyRow`), the dense one first.

    Raises:
        as `fp4graph.study.latency.measure`; OptionError: a value that does not exist.
    """
    if mode not in (None, "default") and inner != "inductor":
        raise OptionError(f"mode {mode!r} is for inner='inductor'")
    selects = _or_all(select, packed)
    plan = plan_of(selects, format, activations, quantizer, name, calibration, packed=packed)
    with shown(progress) as told, in_evaluation(model) as loaded:
        parameter = next(loaded.model.parameters())
        mode = mode or mode_for(parameter.device.type, inner)
        variants = [Variant(trial, inner, mode, attention) for trial in plan]
        rows = measure(
            loaded,
            variants,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            memory=memory,
            progress=told,
        )
        dtype = str(parameter.dtype).removeprefix("torch.")
    work = f"{prompt_tokens} prompt + {new_tokens} new tokens, {rounds} rounds"
    title = f"{loaded.name}, {dtype}, {inner}, {rows[0].attention} attention: {work}"
    return Table(rows, views.of_latency(rows, title), verdicts.of_latency(rows))


def tasks(
    model: nn.Module | LoadedModel,
    tasks: Texts,
    select: Selects | None = None,
    format: Texts = (),
    activations: Texts = "none",
    quantizer: Texts = (),
    *,
    tokenizer: Any = None,
    name: Texts = (),
    direction: str = "only",
    calibration: Calibrations = (),
    packed: Packed = (),
    limit: int | None = None,
    include: Path | str | None = None,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Table:
    """Run tasks of lm-evaluation-harness with FP4 in a model, and on the dense one.

    Args:
        model: as in `ablate`.
        tasks: names that lm-evaluation-harness knows: tasks, groups, tags.
        select: as in `latency`.
        format: as in `ablate`.
        activations: as in `ablate`.
        quantizer: as in `ablate`.
        tokenizer: of the model; one that `fp4graph.models.load` loaded has its own.
        name: as in `ablate`.
        direction: as in `ablate`.
        calibration: as in `ablate`.
        packed: as in `ablate`.
        limit: the first questions of each task alone.
        include: folder of further tasks.
        batch_size: questions at a time.
        progress: is told how far it is; None shows it where this runs.

    Returns:
        a row for each trial, task, metric and filter (`fp4graph.study.tasks.TaskRow`).

    Raises:
        as `fp4graph.study.tasks.evaluate_tasks`; OptionError: no tokenizer.
    """
    selects = _or_all(select, packed)
    ways = (format, activations, quantizer, name, calibration, direction)
    plan = plan_of(selects, *ways, packed)
    with shown(progress) as told, in_evaluation(model) as loaded:
        if tokenizer is not None:
            loaded = replace(loaded, tokenizer=tokenizer)
        if loaded.tokenizer is None and not loaded.is_random:
            raise OptionError("tasks need the model's tokenizer: tokenizer=")
        folder = None if include is None else Path(include)
        names = texts_of(tasks)
        found = evaluate_tasks(loaded, plan, names, limit, folder, batch_size, told)
        rows = list(found)
    title = f"{loaded.name}, {', '.join(names)}"
    return Table(rows, views.of_tasks(rows, title), verdicts.of_tasks(rows))


def _or_all(select: Selects | None, packed: Packed) -> Selects:
    if select is not None:
        return select
    return () if packed else "all"
