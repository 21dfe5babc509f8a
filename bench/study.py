"""Writes the tables of docs/studies/smollm2-135m.md from what `make study` measured.

    python bench/study.py

The results are in docs/studies/smollm2-135m/: trials.sqlite, and the JSON lines of `sensitivity`
and `outliers` with their correlations, and of `bench/redraws.py`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from markdown import fill, table
from scipy.stats import spearmanr
from study_results import DATA, DOCS, ROLES, SETTINGS, Results, name
from study_sets import additivity, agreement, left_out, redraws

from fp4graph import Activations
from fp4graph.study.plot import draw
from fp4graph.study.plot_scores import draw_cells

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp4graph.study.measured import Measured

PAGE = DOCS / "studies/smollm2-135m.md"
ENDS = 3  # blocks
WHAT = {"dnll": "dNLL", "kl": "KL", "left out": "left out"}
STATISTICS = ("input ratio", "input max", "input kurtosis", "weight ratio", "weight kurtosis")

# 2603.08747, appendix B, tables 2 to 4: how much lower the perplexity is with the role left dense
PAPER = {  # in the order of ROLES
    ("0.5B", "nvfp4"): (1.16, 1.23, 0.90, 0.64, 0.34, 0.26, 0.59),
    ("0.5B", "mxfp4"): (7.92, 8.25, 5.47, 5.26, 3.25, 1.98, 4.94),
    ("7B", "nvfp4"): (0.11, 0.10, 0.08, 0.03, 0.02, 0.02, 0.04),
    ("7B", "mxfp4"): (0.50, 0.31, 0.23, 0.15, 0.10, 0.07, 0.13),
    ("14B", "nvfp4"): (0.16, 0.14, 0.12, 0.03, 0.02, 0.02, 0.05),
    ("14B", "mxfp4"): (0.39, 0.24, 0.20, 0.07, 0.10, 0.08, 0.13),
}


def roles(results: Results) -> str:
    """Write the damage of each role, alone and left out, for each text."""
    texts = {"20,480 tokens": results.roles, "4,096 tokens": results.grid}
    parts = []
    for tokens, source in texts.items():
        there = [s for s in SETTINGS if s in source and results.role(source[s], "q", "only")]
        if not there:
            continue
        found = [_role(results, [source[s] for s in there], role) for role in (*ROLES, "all")]
        head = [text for s in there for text in (f"{name(s)} dNLL", "KL", "left out", "per GB")]
        parts.append(f"{tokens}:\n\n{table(['role', *head], found)}")
    return "\n\n".join(parts)


def _role(results: Results, found: list[Measured], role: str) -> list[str]:
    line = [f"`{role}`"]
    for setting in found:
        only = results.role(setting, role, "only")
        but = results.role(setting, role, "except")
        every = results.role(setting, "all", "only")
        line.append(f"{only.dnll:.4f} +- {only.dnll_se:.4f}" if only else "")
        line.append(f"{only.kl:.4f}" if only else "")
        line.append(f"{every.dnll - but.dnll:.4f}" if but and every else "")
        line.append(f"{1000 * only.dnll_per_mb:.2f}" if only else "")
    return line


def order(results: Results) -> str:
    """Write how the order of roles agrees with the paper's."""
    columns = [(mode, what) for mode in ("none", "same") for what in WHAT]
    rows = []
    for (size, format), gains in PAPER.items():
        ranks = [_rank(results, (format, mode), what, gains) for mode, what in columns]
        rows.append((f"{size} {format.upper()}", *ranks))
    heads = [f"{Activations(mode).mode()} {WHAT[what]}" for mode, what in columns]
    return table(["the paper's", *heads], rows)


def _rank(results: Results, setting: tuple[str, str], what: str, gains: tuple[float, ...]) -> str:
    direction = "except" if what == "left out" else "only"
    for source in (results.roles, results.grid):
        if setting in source:
            each = [results.role(source[setting], role, direction) for role in ROLES]
            if all(each):
                ours = [row.kl if what == "kl" else row.dnll for row in each]
                sign = -1 if what == "left out" else 1
                return f"{sign * spearmanr(ours, gains).statistic:.2f}"
    return ""


def cells(results: Results, found: Measured) -> dict[tuple[str, int], Any]:
    """Return the trials of single linears by role and block."""
    tags = results.tags
    return {(str(tags[p].role), tags[p].block or 0): row for p, row in found.singles.items()}


def blocks(results: Results) -> str:
    """Write what whole blocks cost, in every setting, and draw it."""
    shares: dict[tuple[str, int], float] = {}
    rows = []
    for setting in filter(results.grid.__contains__, SETTINGS):
        found = results.grid[setting].trials.values()
        named = ((re.fullmatch(r"blocks=(\d+)", row.selector), row) for row in found)
        kl = {int(m[1]): row.kl for m, row in named if m and row.direction == "only"}
        if len(kl) > ENDS:
            whole = sum(kl.values())
            shares |= {(name(setting), block): kl[block] / whole for block in sorted(kl)}
            worst = sorted(kl, key=lambda block: -kl[block])[:ENDS]
            most = ", ".join(f"{block} ({kl[block]:.4f})" for block in worst)
            rows.append((name(setting), f"{whole:.4f}", *(f"{x:.0%}" for x in ends(kl)), most))
    title = "SmolLM2-135M: where the damage is"
    label = "share of the sum of KL"
    draw_cells({"": shares}, label, title, DOCS / "images/blocks.png", "setting")
    heads = ["", "sum of KL", f"first {ENDS}", f"last {ENDS}", "the worst, with their KL"]
    return table(heads, rows)


def ends(kl: Mapping[int, float]) -> tuple[float, float]:
    """Return what share of the sum the first blocks have, and the last."""
    order = sorted(kl)
    parts = (order[:ENDS], order[-ENDS:])
    first, last = (sum(kl[block] for block in part) / sum(kl.values()) for part in parts)
    return first, last


def grid(results: Results) -> str:
    """Write where in the model the damage is, linear by linear."""
    parts = []
    for setting, found in results.grid.items():
        grid = cells(results, found)
        if not grid:
            continue
        rows = list(grid.values())
        kl: dict[int, float] = defaultdict(float)
        for (_, block), row in grid.items():
            kl[block] += row.kl
        first, last = ends(kl)
        worst = sorted(grid.items(), key=lambda item: -item[1].kl)[:10]
        parts.append(
            f"{name(setting)}, {len(grid)} linears: blocks 0 to {ENDS - 1} have {first:.0%} of "
            f"the sum of KL, the last {ENDS} {last:.0%}; an even share is {ENDS / len(kl):.0%}. "
            f"{sum(r.dnll < 0 for r in rows)} linears lower the NLL; dNLL is within two standard "
            f"errors of 0 for {sum(abs(r.dnll) < 2 * r.dnll_se for r in rows)}, KL for "
            f"{sum(r.kl < 2 * r.kl_se for r in rows)}.\n\n"
            + table(
                ["linear", "KL", "dNLL", "+-"],
                [
                    (
                        f"`{role},blocks={block}`",
                        f"{r.kl:.4f}",
                        f"{r.dnll:+.4f}",
                        f"{r.dnll_se:.4f}",
                    )
                    for (role, block), r in worst
                ],
            )
        )
    for format in ("nvfp4", "mxfp4"):
        settings = [results.grid[s] for s in SETTINGS if s[0] == format and s in results.grid]
        rows = [row for found in settings for row in found.singles.values()]
        draw(rows, f"SmolLM2-135M, {format.upper()}", DOCS / f"images/grid-{format}.png")
    return "\n\n".join(parts)


def lines(file: str) -> list[dict[str, Any]]:
    """Return JSON lines that are correlations."""
    text = (DATA / file).read_text(encoding="utf-8")
    return [row for row in map(json.loads, text.splitlines()) if "spearman" in row]


def correlations(file: str, predictors: tuple[str, ...] = ()) -> str:
    """Write correlations with measured damage, KL and dNLL beside each other.

    Args:
        file: JSON lines.
        predictors: which, all if empty.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = defaultdict(dict)
    for row in lines(file):
        if predictors and row["predictor"] not in predictors:
            continue
        setting = name((row["format"], row["activations"]))
        found[row["predictor"], setting, row["without"] or ""][row["target"]] = row
    rows = [
        (f"`{predictor}`", setting, without, *(_both(each[target]) for target in ("kl", "dnll")))
        for (predictor, setting, without), each in found.items()
    ]
    return table(["score", "setting", "without", "KL: Spearman, Pearson", "dNLL"], rows)


def _both(row: dict[str, Any]) -> str:
    return "{spearman:.2f} [{spearman_low:.2f}, {spearman_high:.2f}], {pearson:.2f}".format(**row)


def main() -> None:
    results = Results()
    fill(
        PAGE,
        {
            "roles": roles(results),
            "order": order(results),
            "blocks": blocks(results),
            "grid": grid(results),
            "agreement": agreement(results),
            "left out": left_out(results),
            "redraws": redraws(),
            "outliers": correlations("outliers.jsonl", STATISTICS),
            "sensitivity": correlations("sensitivity.jsonl"),
            "additivity": additivity(results),
        },
    )


if __name__ == "__main__":
    main()
