"""fp4graph export-results: what a store holds, for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from fp4graph.cli.common import open_results, output
from fp4graph.study.export import export


@click.command("export-results")
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def export_command(store: Path, file: Path) -> None:
    """Write every trial in STORE (a results folder, or its trials.sqlite) to FILE.

    The name of FILE says the format: .jsonl, .csv or .parquet. Each row has the trial's result and
    all that it depends on: model, text, dtype, versions.
    """
    rows = [{**identity, **result} for identity, result in open_results(store).all()]
    export(rows, file)
    output(as_json=False).print(f"{len(rows)} trials: {file}")
