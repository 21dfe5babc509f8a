"""fp4graph page: one HTML file of all that a folder of results holds."""

from __future__ import annotations

from pathlib import Path

import click

from fp4graph.cli.common import output


@click.command("page", short_help="Write one HTML file of all results.")
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file.  [default: report.html in STORE]",
)
@click.option(
    "--node-data",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A .json file with the KL by linear, for Model Explorer.",
)
def page_command(store: Path, out: Path | None, node_data: Path | None) -> None:
    """Write what STORE holds as one HTML file that needs no network and no server.

    STORE is a folder of `ablate`, or its trials.sqlite. The page also has what other commands
    printed with --json into .jsonl files there, and what calibrations there say of themselves.
    """
    from fp4graph.files import write_text
    from fp4graph.page import gather, write_page
    from fp4graph.page import node_data as for_explorer

    found = gather(store)
    out = out or (store if store.is_dir() else store.parent) / "report.html"
    write_page(found, out)
    said = output(as_json=False)
    said.print(f"page: {out} ({out.stat().st_size / 1e6:.1f} MB)", markup=False)
    if node_data is not None:
        write_text(node_data, for_explorer(found))
        said.print(f"node data: {node_data}", markup=False)
