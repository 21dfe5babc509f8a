"""Writes the tables of docs/studies/quantizers.md from the trials that its commands measured.

    python bench/quantizers.py

They are in docs/studies/quantizers/trials.sqlite.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from markdown import fill, table

from fp4graph import Activations
from fp4graph.study.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp4graph.study.trial import Row

    Trials = Mapping[tuple[str, str, str], list[Row]]

STUDIES = Path(__file__).parents[1] / "docs/studies"
QUANTIZERS = (
    "rtn",
    "four-over-six",
    "grid-search",
    "alternating-search",
    "scale-search",
    "weighted-scale-search",
    "gptq",
    "gptq:scale-search",
    "gptq:weighted-scale-search",
    "gptq:scale-search+smooth",
    "gptq:weighted-scale-search+smooth",
    "mr-gptq",
    "learned:scale-search",
    "learned:scale-search+smooth",
    "learned@32",
)
FORMATS = ("nvfp4", "mxfp4", "mxfp4-fitted")


def trials() -> Trials:
    """Read the trials by format, activations and quantizer, one a calibration."""
    found: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for stored in Store(STUDIES / "quantizers/trials.sqlite").all():
        row = stored.row
        if row.format is not None:
            found[row.format, row.activations, row.quantizer].append(row)
    return found


def damage(found: Trials, activations: str) -> str:
    """Write what each quantizer leaves of rounding to nearest's damage."""
    formats = [each for each in FORMATS if (each, activations, "rtn") in found]
    lines = []
    for quantizer in QUANTIZERS:
        cells = []
        for format in formats:
            rows = found.get((format, activations, quantizer))
            (nearest,) = found[format, activations, "rtn"]
            if not rows:
                cells += ["", "", ""]
                continue
            gone = "" if quantizer == "rtn" else f"{1 - rows[0].dnll / nearest.dnll:.0%}"
            cells += [f"{rows[0].dnll:.4f} +- {rows[0].dnll_se:.4f}", f"{rows[0].kl:.4f}", gone]
        if any(cells):
            lines.append((f"`{quantizer}`", *cells))
    heads = [f"{each.upper()} {what}" for each in formats for what in ("dNLL", "KL", "gone")]
    return table([f"{Activations(activations).mode()}", *heads], lines)


def seeds(found: Trials) -> str:
    """Write how far results of several calibration texts are apart."""
    lines = []
    for (format, activations, quantizer), rows in found.items():
        if len(rows) > 2:
            dnll, kl = [row.dnll for row in rows], [row.kl for row in rows]
            setting = f"{format.upper()} {Activations(activations).mode()} `{quantizer}`"
            each = (f"{statistics.mean(x):.4f} +- {statistics.stdev(x):.4f}" for x in (dnll, kl))
            lines.append((setting, ", ".join(f"{value:.4f}" for value in dnll), *each))
    return table(["", "dNLL of each", "dNLL: mean, spread", "KL: mean, spread"], lines)


def main() -> None:
    found = trials()
    parts = {"w4a16": damage(found, "none"), "w4a4": damage(found, "same"), "seeds": seeds(found)}
    fill(STUDIES / "quantizers.md", parts)


if __name__ == "__main__":
    main()
