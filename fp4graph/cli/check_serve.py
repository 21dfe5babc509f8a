"""fp4graph check-serve: what engines will make of a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fp4graph.cli.common import FAULT, output, print_json
from fp4graph.cli.options import CommaList, json_option
from fp4graph.tables import Column, TextTable

if TYPE_CHECKING:
    from fp4graph.serve.check import Row


@click.command("check-serve", short_help="Say what vLLM and others will make of a checkpoint.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--engine",
    "engines",
    type=CommaList(),
    default=(),
    help="vllm, sglang, transformers, compressed-tensors, llama.cpp.  [default: all]",
)
@json_option
def check_serve_command(folder: Path, engines: tuple[str, ...], as_json: bool) -> None:
    """Say for each linear in FOLDER how each engine would run it, by the engine's own rules.

    No engine is started or installed. The exit status is 1 where one would refuse the checkpoint,
    or compute something else than what it holds.
    """
    from fp4graph.serve.check import check

    rows, verdicts = check(folder, engines)
    if as_json:
        for each in (*rows, *verdicts):
            print_json(each)
    console = output(as_json=as_json)
    console.print(_table(rows, str(folder)))
    for verdict in verdicts:
        found = "loads it as it is" if verdict.loads else f"does not: {verdict.why}"
        style = "" if verdict.loads else "red"
        console.print(f"{verdict.engine} ({verdict.rules}): {found}", markup=False, style=style)
    if not all(verdict.loads for verdict in verdicts):
        sys.exit(FAULT)


def _table(rows: list[Row], title: str) -> TextTable:
    """Return a line for linears of one name that fare alike, and how many there are."""
    counts: dict[tuple[str, ...], int] = {}
    for row in rows:
        last = row.linear.rpartition(".")[2]
        key = (last, row.on_disk, *(each.runs for each in row.engines.values()))
        counts[key] = counts.get(key, 0) + 1
    keys = list(counts)
    columns = [
        Column("linear", [key[0] for key in keys], "label"),
        Column("count", [str(counts[key]) for key in keys]),
        Column("on disk", [key[1] for key in keys]),
    ]
    engines = list(rows[0].engines) if rows else []
    columns += [
        Column(engine, [key[place] for key in keys]) for place, engine in enumerate(engines, 2)
    ]
    wrong = frozenset(number for number, key in enumerate(keys) if "ERROR" in key)
    return TextTable(title, columns, wrong=wrong)
