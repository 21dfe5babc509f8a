"""Options of the commands that look for the best mix for a budget."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from fp4graph.cli.options import CommaList

if TYPE_CHECKING:
    from collections.abc import Callable

_UNITS = {"": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9}


class Size(click.ParamType[float]):
    """Bytes, with MB or GB behind a number if wanted."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the number and its unit."""
        found = re.fullmatch(r"([\d.]+)\s*([kKmMgG]?[bB]?)", str(value))
        unit = found[2].lower() if found else None
        if found is None or unit not in _UNITS:
            self.fail(f"{value!r}: expected bytes, such as 900MB or 1.2GB", param, ctx)
        return float(found[1]) * _UNITS[unit]


def budget_options(formats: str) -> Callable[[Any], Any]:
    """Return what adds the budgets, what linears may run in, and the text to measure on.

    Args:
        formats: the default of `--format`.
    """

    def add(command: Any) -> Any:
        for option in (
            click.option("--verify-tokens", type=click.IntRange(min=2), default=4096,
                         show_default=True),
            click.option("--verify-corpus", default="pydoc-second", show_default=True,
                         help="The text to measure on; another one than --corpus."),
            click.option("--activations", type=click.Choice(["none", "same"]), default="none",
                         show_default=True, help="none is W4A16, same is W4A4, of FP8 W8A8."),
            click.option("--format", type=CommaList(), default=formats, show_default=True,
                         help="What linears may run in beside dense."),
            click.option("--kl", type=float, help="Most nats a token; the fewest bytes are found."),
            click.option("--speedup", type=float,
                         help="How much faster than dense linears are to be."),
            click.option("--ms", type=float, help="Most milliseconds that linears take."),
            click.option("--bytes", type=Size(), help="Most bytes of block linears: 900MB, 1.2GB."),
            click.option("--bits", type=float,
                         help="Most bits a weight of block linears, scales included; dense is 16."),
        ):  # fmt: skip
            command = option(command)
        return command

    return add
