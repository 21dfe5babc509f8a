"""fp4graph ablate: the damage of FP4, selection by selection."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp4graph import Calibration, OptionError
from fp4graph.cli.ablation_table import table_of
from fp4graph.cli.common import (
    CommaList,
    check_interrupt,
    check_trained,
    device_option,
    dtype_option,
    json_option,
    load_model,
    output,
    print_json,
    progress_bar,
    read_text,
    stderr,
    weights_option,
)
from fp4graph.files import write_text
from fp4graph.quantizers import DATA_FREE
from fp4graph.study.ablate import Ablation
from fp4graph.study.evaluate import cut
from fp4graph.study.export import export
from fp4graph.study.plan import DIRECTIONS, JUST_ONE, Combinations, Group, by_information, read_plan
from fp4graph.study.plot import draw
from fp4graph.study.probe import read_probe
from fp4graph.study.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from rich.progress import Progress

    from fp4graph.study.trial import Calibrations, Row, Trial

_WIKITEXT2_WINDOW = 2048


class _Bar:
    """Shows trials on a progress bar, and their rows as JSON if asked."""

    def __init__(self, bar: Progress, *, as_json: bool) -> None:
        self._bar = bar
        self._as_json = as_json
        self._task: Any = None

    def start(self, total: int) -> None:
        self._task = self._bar.add_task("dense model", total=total)

    def advance(self) -> None:
        check_interrupt()
        self._bar.advance(self._task)

    def trial(self, trial: Trial, row: Row, *, cached: bool) -> None:
        kept = " (kept)" if cached else ""
        self._bar.update(self._task, description=f"{trial.selector} {row.format or ''}{kept}")
        if self._as_json:
            print_json(row)


@click.command("ablate")
@click.argument("model")
@click.option("--select", "selects", multiple=True, help="Selector; may be given several times.")
@click.option("--by", help="One trial for each role, block, or role,block.")
@click.option("--plan", help="roles, blocks, grid, paper, or a .toml file: docs/studies.md.")
@click.option(
    "--direction",
    type=click.Choice(list(DIRECTIONS)),
    default="only",
    show_default=True,
    help="FP4 in the selection only, everywhere except in it, or one trial of each.",
)
@click.option("--format", type=CommaList(), default="nvfp4", show_default=True)
@click.option(
    "--activations",
    type=CommaList("none", "same"),
    default="none",
    show_default=True,
    help="none is W4A16, same is W4A4.",
)
@click.option(
    "--quantizer",
    type=CommaList(),
    default="rtn",
    show_default=True,
    help=f"How codes are found: {', '.join(DATA_FREE)}, each with @32 and the like for weight and "
    "input rotated; with --calibration what that has.",
)
@click.option(
    "--calibration",
    "calibration_files",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Codes that `fp4graph calibrate` found; may be given several times.",
)
@click.option(
    "--corpus",
    default="pydoc",
    show_default=True,
    help="pydoc (with a calibration pydoc-second, its second half), a file, or hf:DATASET.",
)
@click.option("--tokens", type=click.IntRange(min=2), default=4096, show_default=True)
@click.option("--seq-len", type=click.IntRange(min=2), default=512, show_default=True)
@click.option(
    "--protocol",
    type=click.Choice(["wikitext2"]),
    help="wikitext2: the whole text in windows of 2048 tokens, the tail dropped.",
)
@click.option(
    "--probe",
    type=click.Path(path_type=Path),
    help="Questions, JSON lines of context, choices, answer: docs/studies.md.",
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MIN",
    help="Run the trials that tell most first, and begin none after MIN minutes.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for results.")
@dtype_option
@weights_option
@device_option
@json_option
def ablate_command(
    model: str,
    selects: tuple[str, ...],
    by: str | None,
    plan: str | None,
    calibration_files: tuple[Path, ...],
    corpus: str,
    tokens: int,
    seq_len: int,
    protocol: str | None,
    probe: Path | None,
    budget: float | None,
    out: Path | None,
    dtype: str,
    device: torch.device,
    as_json: bool,
    **combinations: Any,
) -> None:
    """Measure what FP4 does to MODEL's predictions on a text, against the dense model.

    Results go to OUT (default: fp4graph-out/MODEL): trials.sqlite, ablation.jsonl, ablation.png
    and run.json. A run that was stopped, by whatever means, goes on where it was when the same
    command is given again.
    """
    calibrations = _calibrations(calibration_files)
    groups = _groups(selects, by, plan, combinations, calibrations)
    corpus = _text_beside(corpus, calibrations)
    check_trained(model)
    whole = protocol == "wikitext2"
    if whole:
        seq_len = _WIKITEXT2_WINDOW if _is_default("seq_len") else seq_len
        whole = _is_default("tokens")
    wanted = None if whole else tokens
    text = read_text(corpus, wanted)
    out = out or Path("fp4graph-out") / Path(model).name
    loaded = load_model(model, dtype, device)
    store = Store(out / "trials.sqlite")
    windows = cut(text, loaded.tokenizer, wanted, seq_len)
    length = windows.ids.shape[1]
    questions = None if probe is None else read_probe(probe, loaded.tokenizer, length)
    with stderr.status(f"tracing {model}"):
        ablation = Ablation(loaded, windows, store, out, questions)
    todo = _todo(ablation, groups, by_budget=budget is not None)
    provenance = {**ablation.provenance(), "corpus": corpus, "seq_len": seq_len}
    write_text(out / "run.json", json.dumps(provenance, indent=2) + "\n")
    rows: list[Row] = []
    with progress_bar() as bar:
        seconds = math.inf if budget is None else budget * 60
        for row in ablation.run(todo, _Bar(bar, as_json=as_json), seconds):
            rows.append(row)
            export([asdict(each) for each in rows], out / "ablation.jsonl")
    store.close()
    title = f"{model}, {corpus}, {provenance['scored_tokens']} tokens, {dtype}"
    console = output(as_json=as_json)
    console.print(table_of(rows, title))
    if len(rows) > 1:
        draw(rows, title, out / "ablation.png")
        console.print(f"picture: {out / 'ablation.png'}")
    console.print(f"rows: {out / 'ablation.jsonl'}   kept in: {out / 'trials.sqlite'}")
    if len(rows) < len(todo):
        left = len(todo) - len(rows)
        console.print(f"{left} of {len(todo)} trials are left: the same command goes on with them")


def _calibrations(files: tuple[Path, ...]) -> Calibrations:
    found = map(Calibration.load, files)
    return {(str(each.format), str(each.quantizer)): each for each in found}


def _groups(
    selects: tuple[str, ...],
    by: str | None,
    plan: str | None,
    combinations: dict[str, Any],
    calibrations: Calibrations,
) -> list[Combinations]:
    """Return what the options ask for; a plan's own stands where nothing is given."""
    given = {name: value for name, value in combinations.items() if not _is_default(name)}
    if calibrations and not (plan or "").endswith(".toml"):  # they are what to measure
        formats, quantizers = zip(*calibrations, strict=True)
        given = {"format": _once(formats), "quantizer": _once(quantizers), **given}
    if bool(selects) + bool(by) + bool(plan) != 1:
        raise OptionError(JUST_ONE)
    if plan is not None:
        groups = read_plan(plan, given)
    else:
        groups = (Group(selects, (by,) if by else (), **{**combinations, **given}),)
    return [group.read(calibrations) for group in groups]


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _text_beside(corpus: str, calibrations: Calibrations) -> str:
    """Return the text to measure on: never the one that was calibrated with."""
    if calibrations and _is_default("corpus"):
        corpus = "pydoc-second"
    if any(each.about.get("corpus") == corpus for each in calibrations.values()):
        problem = "the text to measure on is the one that was calibrated with"
        raise OptionError(f"--corpus {corpus}: {problem}")
    return corpus


def _todo(ablation: Ablation, groups: Sequence[Combinations], *, by_budget: bool) -> list[Trial]:
    """Return the trials, checked against the model."""
    if ablation.whole_because:
        stderr.print(f"every trial runs the whole model: {ablation.whole_because}")
    report = ablation.report()
    if report.refused:
        first = report.refused[0]
        stderr.print(
            f"{len(report.refused)} linears stay dense in every trial, such as {first.path}: "
            f"{first.reason}"
        )
    found = (trial for group in groups for trial in group.trials(report))
    plan = list(dict.fromkeys(found))
    ablation.check(plan)
    return by_information(plan, ablation.sizes(plan)) if by_budget else plan


def _is_default(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is not click.core.ParameterSource.COMMANDLINE
