"""fp4graph export-results: what a store holds, for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from fp4graph.cli.common import output


@click.command("export-results", short_help="Write results for other programs.")
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def export_results_command(store: Path, file: Path) -> None:
    """Write every trial in STORE (a results folder, or its trials.sqlite) to FILE.

    The name of FILE says the format: .jsonl, .csv or .parquet. Each row has the trial's result, the
    names of model and corpus, date and machine, and all that the result depends on.
    """
    from fp4graph.study.export import export
    from fp4graph.study.results import open_results, records

    rows = records(open_results(store).all())
    export(rows, file)
    output(as_json=False).print(f"{len(rows)} trials: {file}", markup=False)
