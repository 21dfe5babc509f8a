"""fp4graph ablate: the damage of FP4, selection by selection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp4graph.cli.common import (
    load_models,
    output,
    print_table,
    progress_shown,
    read_text,
    stderr,
)
from fp4graph.cli.options import (
    check_trained,
    dense_option,
    device_option,
    direction_option,
    dtype_option,
    is_default,
    json_option,
    scheme_options,
    selected,
    selection_options,
    stream_option,
    text_options,
    weights_option,
)
from fp4graph.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from fp4graph import Calibration
    from fp4graph.study.plan import Combinations

_WIKITEXT2_WINDOW = 2048


@click.command("ablate", short_help="Measure what FP4 costs, selection by selection.")
@click.argument("model")
@selection_options
@click.option("--by", help="One trial for each role, block, or role,block.")
@click.option("--plan", help="roles, blocks, grid, paper, or a .toml file: docs/studies.md.")
@direction_option
@scheme_options
@text_options(4096, 512)
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
@click.option(
    "--on",
    metavar="ray|ray://HOST:PORT",
    help="Run trials on a Ray cluster, or on all GPUs of this machine.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="How many, each with a model of its own.  [default: one a GPU, or one a machine]",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for results.")
@dtype_option
@dense_option
@weights_option
@stream_option
@device_option
@json_option
def ablate_command(
    model: str,
    selects: tuple[str, ...],
    mixes: tuple[Path, ...],
    names: tuple[str, ...],
    by: str | None,
    plan: str | None,
    calibrations: tuple[Path, ...],
    corpus: str,
    tokens: int,
    seq_len: int,
    protocol: str | None,
    probe: Path | None,
    budget: float | None,
    on: str | None,
    workers: int | None,
    out: Path | None,
    dtype: str,
    dense: str | None,
    device: torch.device,
    as_json: bool,
    **combinations: Any,
) -> None:
    """Measure what FP4 does to MODEL's predictions on a text, against the dense model.

    Of a folder that `fp4graph convert` wrote, the model in it is measured as it is.

    Results gather in OUT (default: fp4graph-out/MODEL), whatever commands they come from:
    trials.sqlite, ablation.jsonl, runs.jsonl and ablation.png; `fp4graph show OUT` prints them. A
    run that was stopped, by whatever means, goes on where it was when the same command is given
    again.
    """
    from fp4graph.loading import dense_of
    from fp4graph.study.cluster import Where
    from fp4graph.study.evaluate import cut
    from fp4graph.study.given import read_calibrations
    from fp4graph.study.plan import converted
    from fp4graph.study.probe import read_probe
    from fp4graph.study.run import run_trials
    from fp4graph.study.trial import Trial

    where = None if on is None else Where(on, workers)
    if where is None and workers is not None:
        raise OptionError("--workers is for a cluster: say --on ray")
    codes = read_calibrations(calibrations)
    given = selected(selects, mixes, names)
    is_packed = dense_of(model) is not None
    groups = (
        []
        if is_packed and not (given[0] or by or plan)
        else _groups(given, by, plan, combinations, codes)
    )
    corpus = _text_beside(corpus, codes)
    check_trained(model)
    whole = protocol == "wikitext2"
    if whole:
        seq_len = _WIKITEXT2_WINDOW if is_default("seq_len") else seq_len
        whole = is_default("tokens")
    wanted = None if whole else tokens
    text = read_text(corpus, wanted)
    out = out or Path("fp4graph-out") / Path(model).name
    loaded, packed = load_models(model, dtype, device, dense)
    groups += [converted([Trial.of_packed(each) for each in packed])] if packed else []
    tokenizer = loaded.text_tokenizer()
    windows = cut(text, tokenizer, wanted, seq_len)
    length = windows.ids.shape[1]
    questions = None if probe is None else read_probe(probe, tokenizer, length)
    stderr.print(f"tracing {model}", markup=False)
    with progress_shown(as_json=as_json) as progress:
        seconds = None if budget is None else budget * 60
        table = run_trials(
            *(loaded, windows, groups, out, progress),
            probe=questions,
            budget=seconds,
            corpus=corpus,
            where=where,
        )
    print_table(table, as_json=as_json, rows=False)
    console = output(as_json=as_json)
    console.print(f"picture: {out / 'ablation.png'}   rows: {out / 'ablation.jsonl'}", markup=False)
    console.print(f"all that was measured: fp4graph show {out}", markup=False)


def _groups(
    selections: tuple[tuple[Any, ...], tuple[str, ...]],
    by: str | None,
    plan: str | None,
    combinations: dict[str, Any],
    codes: Sequence[Calibration],
) -> list[Combinations]:
    """Return what the options ask for; a plan's own stands where nothing is given."""
    from fp4graph.study.plan import JUST_ONE, Group, read_plan

    selects, names = selections
    if bool(selects) + bool(by) + bool(plan) != 1:
        raise OptionError(JUST_ONE)
    if plan is not None:
        given = {name: value for name, value in combinations.items() if not is_default(name)}
        groups = read_plan(plan, given)
    else:
        groups = (Group(selects, (by,) if by else (), names, **combinations),)
    return [group.read(codes) for group in groups]


def _text_beside(corpus: str, codes: Sequence[Calibration]) -> str:
    """Return the text to measure on: never the one that was calibrated with."""
    if codes and is_default("corpus"):
        corpus = "pydoc-second"
    if any(each.about.get("corpus") == corpus for each in codes):
        problem = "the text to measure on is the one that was calibrated with"
        raise OptionError(f"--corpus {corpus}: {problem}")
    return corpus
