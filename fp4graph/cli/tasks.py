"""fp4graph tasks: what FP4 does to capabilities, by lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import fp4graph
from fp4graph.cli.common import load_models, print_table, progress_shown
from fp4graph.cli.options import (
    CommaList,
    check_trained,
    dense_option,
    device_option,
    direction_option,
    dtype_option,
    json_option,
    scheme_options,
    selected,
    selection_options,
    weights_option,
)

if TYPE_CHECKING:
    import torch


@click.command("tasks", short_help="Run tasks of lm-evaluation-harness in FP4.")
@click.argument("model")
@click.option("--task", "tasks", type=CommaList(), required=True, help="As the harness names them.")
@selection_options
@scheme_options
@direction_option
@click.option("--limit", type=click.IntRange(min=1), help="The first questions of each task alone.")
@click.option(
    "--include",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder of further tasks.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@dtype_option
@dense_option
@weights_option
@device_option
@json_option
def tasks_command(
    model: str,
    tasks: tuple[str, ...],
    selects: tuple[str, ...],
    mixes: tuple[Path, ...],
    names: tuple[str, ...],
    calibrations: tuple[Path, ...],
    format: tuple[str, ...],
    activations: tuple[str, ...],
    quantizer: tuple[str, ...],
    direction: str,
    limit: int | None,
    include: Path | None,
    batch_size: int,
    dtype: str,
    dense: str | None,
    device: torch.device,
    as_json: bool,
) -> None:
    """Run tasks of lm-evaluation-harness on MODEL with FP4 in it, and on the dense one.

    Differences are taken question by question. Without a selection it is `all`, or the model in a
    folder that `fp4graph convert` wrote. Needs fp4graph[eval], and the tasks' data;
    `--task fp4graph` asks 600 questions that ship with it.
    """
    from fp4graph.loading import dense_of
    from fp4graph.study.given import plan_of, read_calibrations

    chosen = bool(selects or mixes or dense_of(model) is not None)
    select, called = selected(selects if chosen else ("all",), mixes, names)
    codes = read_calibrations(calibrations)
    plan_of(select, format, activations, quantizer, called, codes, direction)
    check_trained(model)
    loaded, packed = load_models(model, dtype, device, dense)
    with progress_shown(as_json=as_json) as progress:
        table = fp4graph.study.tasks(
            loaded,
            tasks,
            select,
            format,
            activations,
            quantizer,
            name=called,
            direction=direction,
            calibration=codes,
            packed=packed,
            limit=limit,
            include=include,
            batch_size=batch_size,
            progress=progress,
        )
    print_table(table, as_json=as_json, rows=False)
