"""fp4graph tasks: what FP4 does to capabilities, by lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.table import Table

from fp4graph import Selector
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
    stderr,
    weights_option,
)
from fp4graph.study.plan import DIRECTIONS
from fp4graph.study.tasks import evaluate_tasks
from fp4graph.study.trial import schemes, set_of, trials

if TYPE_CHECKING:
    import torch


@click.command("tasks")
@click.argument("model")
@click.option("--task", "tasks", type=CommaList(), required=True, help="As the harness names them.")
@click.option("--select", "selects", multiple=True, default=("all",), show_default=True)
@click.option("--format", "formats", type=CommaList(), default="nvfp4", show_default=True)
@click.option("--activations", type=CommaList("none", "same"), default="none", show_default=True)
@click.option("--quantizer", type=CommaList(), default="rtn", show_default=True)
@click.option("--direction", type=click.Choice(list(DIRECTIONS)), default="only", show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="The first questions of each task alone.")
@click.option(
    "--include",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder of further tasks.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@dtype_option
@weights_option
@device_option
@json_option
def tasks_command(
    model: str,
    tasks: tuple[str, ...],
    selects: tuple[str, ...],
    formats: tuple[str, ...],
    activations: tuple[str, ...],
    quantizer: tuple[str, ...],
    direction: str,
    limit: int | None,
    include: Path | None,
    batch_size: int,
    dtype: str,
    device: torch.device,
    as_json: bool,
) -> None:
    """Run tasks of lm-evaluation-harness on MODEL with FP4 in it, and on the dense one.

    Differences are taken question by question. Needs fp4graph[eval], and the tasks' data.
    """
    ways = schemes(formats, activations, quantizer)
    plan = trials(list(map(Selector, selects)), ways, DIRECTIONS[direction])
    check_trained(model)
    loaded = load_model(model, dtype, device)
    table = Table(title=f"{model}, {', '.join(tasks)}", box=box.SIMPLE_HEAD)
    for name in ("FP4 in", "format", "mode", "quantizer", "task", "metric", "filter"):
        table.add_column(name, no_wrap=True)
    for name in ("value", "above dense", "+-", "questions"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note")
    with stderr.status(f"running {', '.join(tasks)}"):
        for row in evaluate_tasks(loaded, plan, tasks, limit, include, batch_size):
            check_interrupt()
            if as_json:
                print_json(row)
            dense = row.format is None
            table.add_row(
                set_of(row),
                row.format or "",
                "dense" if dense else row.activations.mode,
                "" if dense else row.quantizer,
                row.task,
                row.metric,
                row.filter,
                "" if row.value is None else f"{row.value:.4f}",
                "" if dense or row.difference is None else f"{row.difference:+.4f}",
                "" if dense or row.difference_se is None else f"{row.difference_se:.4f}",
                str(row.questions),
                row.note,
            )
    output(as_json=as_json).print(table)
