"""The table that `fp4graph ablate` prints: the dense model, then the most damaging trials."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from fp4graph.study.trial import set_of

if TYPE_CHECKING:
    from fp4graph.study.trial import Row

_SHOWN = 40


def table_of(rows: list[Row], title: str) -> Table:
    """Return rows as a table for a terminal, the dense model's first."""
    table = Table(title=title, caption=_caption(rows), box=box.SIMPLE_HEAD)
    table.add_column("selector", no_wrap=True)
    for name in ("format", "mode", "quantizer"):
        table.add_column(name, no_wrap=True)
    dense, *rest = rows
    probed = dense.probe is not None
    names = ("ppl", "dNLL", "+-", "KL", "p99", "top-1", "Mparam", "dNLL/MB")
    for name in (*names, "probe") if probed else names:
        table.add_column(name, justify="right", no_wrap=True)
    worst = sorted(rest, key=lambda row: row.dnll, reverse=True)
    for row in [dense, *worst[:_SHOWN]]:
        table.add_row(
            set_of(row),
            row.format or "",
            "dense" if row.format is None else row.activations.mode,
            "" if row.format is None else row.quantizer,
            "> 1e308" if row.ppl is None else f"{row.ppl:.3f}",
            f"{row.dnll:+.4f}",
            "" if row.dnll_se is None else f"{row.dnll_se:.4f}",
            f"{row.kl:.4f}",
            f"{row.kl_p99:.3f}",
            f"{row.top1:.1%}",
            f"{row.parameters / 1e6:.1f}",
            "" if row.dnll_per_mb is None else f"{row.dnll_per_mb:.5f}",
            *([] if row.probe is None else [f"{row.probe:.1%}"]),
        )
    return table


def _caption(rows: list[Row]) -> str:
    lines = [
        "dNLL, KL: nats a token above the dense model on the same tokens; +-: standard error, "
        "windows being independent; p99: of KL over tokens; MB: saved by FP4"
    ]
    if rows[0].noise is not None:
        lines.append(
            f"text noise: the two halves of this text differ by {rows[0].noise:.4f} +- "
            f"{rows[0].noise_se:.4f} for the dense model itself; this is not the error of dNLL"
        )
    if len(rows) > _SHOWN + 1:
        lines.append(f"the {_SHOWN} most damaging of {len(rows) - 1}; all are in the JSON lines")
    if rows[0].dnll_se is None:
        lines.append("one window gives no error: take more --tokens or a smaller --seq-len")
    return "\n".join(lines)
