"""fp4graph show: tables and pictures of results that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fp4graph.cli.common import output, print_table
from fp4graph.cli.options import CommaList, json_option, picture_option
from fp4graph.errors import OptionError


@click.command("show", short_help="Print and draw results that are there already.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--select", multiple=True, help="Selector or name, or a pattern such as 'down*'.")
@click.option("--by", help="Trials of one role, one block, or one role,block.")
@click.option("--format", type=CommaList(), default=())
@click.option("--activations", type=CommaList(), default=())
@click.option("--quantizer", type=CommaList(), default=())
@click.option("--direction", type=click.Choice(("only", "except", "both")), default="both")
@click.option("--model", type=CommaList(), default=(), help="Name or hash, or a pattern.")
@click.option("--corpus", type=CommaList(), default=(), help="Name or hash, or a pattern.")
@click.option("--dtype", type=CommaList(), default=(), help="Of what stayed dense.")
@picture_option
@json_option
def show_command(
    out: Path, by: str | None, picture: Path | None, as_json: bool, **wanted: Any
) -> None:
    """Show what OUT (a folder of `ablate`, or its trials.sqlite) has.

    There is a table for each model, text and dtype.

    The options say which trials; without any it is all of them. Nothing is measured.
    """
    from fp4graph.study.results import Wanted, open_results, show
    from fp4graph.study.trial import check_by

    kinds = () if by is None else (",".join(reversed(check_by(by))),)
    tables = show(open_results(out), Wanted(by=kinds, **wanted))
    if picture is not None and len(tables) > 1:
        raise OptionError(
            "--picture shows one model, text and dtype: say which, --model, --corpus or --dtype"
        )
    for table in tables:
        print_table(table, as_json=as_json)
    if picture is not None:
        tables[0].draw(picture)
        output(as_json=as_json).print(f"picture: {picture}", markup=False)
