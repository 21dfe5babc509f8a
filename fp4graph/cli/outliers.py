"""fp4graph outliers: how far the values of linears' inputs and weights reach."""

from __future__ import annotations

import click
from rich import box
from rich.table import Table

from fp4graph.cli.common import (
    check_interrupt,
    check_trained,
    dtype_option,
    json_option,
    load_model,
    output,
    print_json,
    progress_bar,
    read_text,
)
from fp4graph.study.evaluate import cut
from fp4graph.study.outliers import Outliers, by_role, outliers


@click.command("outliers")
@click.argument("model")
@click.option("--corpus", default="pydoc", show_default=True, help="pydoc, a file, or hf:DATASET.")
@click.option("--tokens", type=click.IntRange(min=2), default=4096, show_default=True)
@click.option("--seq-len", type=click.IntRange(min=2), default=512, show_default=True)
@dtype_option
@json_option
def outliers_command(
    model: str, corpus: str, tokens: int, seq_len: int, dtype: str, as_json: bool
) -> None:
    """Show the outliers of MODEL's linears' inputs and weights, on a text, by role."""
    check_trained(model)
    text = read_text(corpus, tokens)
    loaded = load_model(model, dtype)
    windows = cut(text, loaded.tokenizer, tokens, seq_len)
    with progress_bar() as bar:
        task = bar.add_task("windows", total=len(windows.ids))

        def progress() -> None:
            check_interrupt()
            bar.advance(task)

        rows = outliers(loaded, windows, progress)
    if as_json:
        for row in rows:
            print_json(row)
    table = Table(title=f"{model}, {corpus}, {tokens} tokens", box=box.SIMPLE_HEAD)
    table.add_column("role")
    names = ("P99.9", "max", "max/P99.9", "kurtosis", "RMS", "outlier channels")
    for name in (*names, *(f"weight {name}" for name in names[:-1])):
        table.add_column(name, justify="right")
    for role, (inputs, weights) in by_role(rows).items():
        table.add_row(role, *_cells(inputs), str(inputs.outlier_channels), *_cells(weights))
    table.caption = "inputs first, then weights; means over the linears of a role"
    output(as_json=as_json).print(table)


def _cells(found: Outliers) -> list[str]:
    values = (found.p999, found.max, found.ratio, found.kurtosis, found.rms)
    return [f"{value:.3g}" for value in values]
