"""fp4graph sensitivity: what FP4 in each linear will cost, from one run of the model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.table import Table

from fp4graph.cli.common import (
    CommaList,
    device_option,
    dtype_option,
    json_option,
    load_windows,
    open_results,
    output,
    picture_option,
    print_json,
    weights_option,
    windows_bar,
)
from fp4graph.cli.correlation_table import show_correlations
from fp4graph.study.correlation import correlate
from fp4graph.study.measured import Measured, measured
from fp4graph.study.plot_scores import draw_cells, draw_points
from fp4graph.study.sensitivity import PREDICTORS, Sensitivity, SensitivityRow
from fp4graph.study.trial import schemes

if TYPE_CHECKING:
    import torch

    from fp4graph.study.correlation import Correlation

_SHOWN = 20


@click.command("sensitivity")
@click.argument("model")
@click.option("--format", "formats", type=CommaList(), default="nvfp4", show_default=True)
@click.option("--activations", type=CommaList("none", "same"), default="none", show_default=True)
@click.option("--quantizer", default="rtn", show_default=True, help="One that needs no data.")
@click.option("--corpus", default="pydoc", show_default=True, help="pydoc, a file, or hf:DATASET.")
@click.option("--tokens", type=click.IntRange(min=2), default=2048, show_default=True)
@click.option(
    "--seq-len",
    type=click.IntRange(min=2),
    default=128,
    show_default=True,
    help="Short windows give more samples.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Random backward passes a window.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Results of `ablate --plan grid`: say how well each score tells what was measured.",
)
@picture_option
@dtype_option
@weights_option
@device_option
@json_option
def sensitivity_command(
    model: str,
    formats: tuple[str, ...],
    activations: tuple[str, ...],
    quantizer: str,
    corpus: str,
    tokens: int,
    seq_len: int,
    samples: int,
    against: Path | None,
    picture: Path | None,
    dtype: str,
    device: torch.device,
    as_json: bool,
) -> None:
    """Score MODEL's block linears by what FP4 in them will cost, without trying each.

    One run over the text and a few backward passes take the place of a run for every linear.
    """
    ways = schemes(formats, activations, [quantizer])
    store = None if against is None else open_results(against)
    loaded, windows = load_windows(model, corpus, tokens, seq_len, dtype, device)
    with windows_bar(len(windows.ids)) as progress:
        found = Sensitivity(loaded, windows, ways, samples, progress)
    if as_json:
        for row in found.rows:
            print_json(row)
    console = output(as_json=as_json)
    title = f"{model}, {corpus}, {tokens} tokens: the most sensitive linears"
    console.print(_table(found.rows, title))
    for path in found.left_out:
        console.print(f"left out: {path}: its weight is made in the graph, or it tells on no logit")
    console.print(f"cost: {found.forwards:.1f} runs of the dense model over the text")
    settings = [] if store is None else measured(store, loaded.revision(), found.tags)
    if picture is not None:
        _draw(found.rows, settings, picture)
    if store is None:
        return
    scores = _scores(found, settings)
    title = "the scores against measured trials of one linear"
    show_correlations(scores, title, as_json=as_json)


def _draw(rows: list[SensitivityRow], settings: list[Measured], path: Path) -> None:
    """Draw every score over the measured damage, or, without any, one score by role and block."""
    settings = [each for each in settings if len(each.singles) > 1]  # of one text, as a rule
    if not settings:
        cells: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
        for row in rows:
            if row.block is not None:
                cells[_title(row)][row.role, row.block] = row.kl
        draw_cells(cells, "KL, estimated, nats", path)
        return
    several = len({setting.text for setting in settings}) > 1
    points = {
        f"{name}\n{_title(setting)}{f', text {setting.text}' if several else ''}": [
            (asdict(row)[name], setting.singles[row.path].kl, row.role)
            for row in rows
            if _title(row) == _title(setting) and row.path in setting.singles
        ]
        for setting in settings
        for name in PREDICTORS
    }
    drawn = {name: each for name, each in points.items() if each}
    if drawn:
        draw_points(drawn, "KL, nats", path, columns=len(PREDICTORS))


def _title(what: SensitivityRow | Measured) -> str:
    return f"{what.format} {what.activations.mode} {what.quantizer}"


def _scores(found: Sensitivity, settings: list[Measured]) -> list[Correlation]:
    by_scheme: dict[tuple[str, str, str], list[SensitivityRow]] = defaultdict(list)
    for row in found.rows:
        by_scheme[row.format, row.activations, row.quantizer].append(row)
    roles = {row.path: row.role for row in found.rows}
    scores = []
    for setting in settings:
        rows = by_scheme[setting.format, setting.activations, setting.quantizer]
        names = (*PREDICTORS, "dnll")
        predictors = {name: {row.path: asdict(row)[name] for row in rows} for name in names}
        scores += correlate(predictors, setting, roles)
    return scores


def _table(rows: list[SensitivityRow], title: str) -> Table:
    """Return the most sensitive linears, a table for a terminal."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("linear", "format", "mode"):
        table.add_column(name, no_wrap=True)
    names = ("SQNR dB", "Fisher", "KL by element", "by token", "by window", "KL", "dNLL")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    worst = sorted(rows, key=lambda row: -row.kl)
    for row in worst[:_SHOWN]:
        table.add_row(
            f"{row.role},blocks={row.block}",
            row.format,
            row.activations.mode,
            f"{row.sqnr:.1f}",
            f"{row.fisher:.3g}",
            f"{row.kl_element:.3g}",
            f"{row.kl_token:.3g}",
            f"{row.kl_window:.3g}",
            f"{row.kl:.3g}",
            f"{row.dnll:+.3g}",
        )
    table.caption = (
        "KL, dNLL: nats a token, estimated; by element, token, window: what is summed first"
    )
    if len(rows) > _SHOWN:
        table.caption += f"\nthe first {_SHOWN} of {len(rows)}; --json has all"
    return table
