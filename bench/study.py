"""Writes the tables of docs/studies/smollm2-135m.md from what `make study` measured.

    python bench/study.py

The results are in docs/studies/smollm2-135m/: trials.sqlite, and the JSON lines of `sensitivity`
and `outliers` with their correlations.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from markdown import fill, table
from scipy.stats import spearmanr

from fp4graph import TracedModel, models
from fp4graph.study.additivity import pairs, sets
from fp4graph.study.measured import Measured, measured
from fp4graph.study.plot import draw
from fp4graph.study.plot_scores import draw_cells, draw_points
from fp4graph.study.store import Store
from fp4graph.study.trial import mode_of

if TYPE_CHECKING:
    from collections.abc import Mapping

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "studies/smollm2-135m.md"
DATA = DOCS / "studies/smollm2-135m"
ROLES = ("down", "up", "gate", "v", "k", "q", "o")
SETTINGS = [(f, a) for a in ("none", "same") for f in ("nvfp4", "mxfp4")]
ENDS = 3  # blocks
ALL_BUT = "all but "
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


class Results:
    """What was measured, by text: `grid` is the one that single linears were measured on."""

    def __init__(self) -> None:
        loaded = models.load(models.SMOLLM2, torch.float32)
        traced = TracedModel(loaded.model)
        with torch.no_grad():
            traced(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False)
        self.tags = {tag.fqn: tag for tag in traced.tags}
        everything = measured(Store(DATA / "trials.sqlite"), loaded.revision(), traced.tags)
        grid_texts = {each.text for each in everything if each.singles}
        self.grid = {key(each): each for each in everything if each.text in grid_texts}
        self.roles = {key(each): each for each in everything if each.text not in grid_texts}

    def role(self, found: Measured, role: str, direction: str) -> Any:
        """Return the trial of a role, or None."""
        rows = found.trials.values()
        return next((r for r in rows if (r.selector, r.direction) == (role, direction)), None)


def key(found: Measured) -> tuple[str, str]:
    return found.format, found.activations


def name(setting: tuple[str, str]) -> str:
    return f"{setting[0].upper()} {mode_of(setting[1])}"


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
    heads = [f"{mode_of(mode)} {WHAT[what]}" for mode, what in columns]
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
    draw_cells({"": shares}, "share of the sum of KL", DOCS / "images/blocks.png")
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
        kl: dict[int, float] = defaultdict(float)
        for (_, block), row in grid.items():
            kl[block] += row.kl
        first, last = ends(kl)
        worst = sorted(grid.items(), key=lambda item: -item[1].kl)[:10]
        parts.append(
            f"{name(setting)}, {len(grid)} linears: blocks 0 to {ENDS - 1} have {first:.0%} of "
            f"the sum of KL, the last {ENDS} {last:.0%}; an even share is {ENDS / len(kl):.0%}. "
            f"{sum(row.dnll < 0 for row in grid.values())} linears lower the NLL.\n\n"
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


def left_out(results: Results) -> str:
    """Write what a linear or block gives back that alone stays dense, beside what it costs."""
    rows = []
    for setting in filter(results.grid.__contains__, SETTINGS):
        trials = {(r.selector, r.direction): r for r in results.grid[setting].trials.values()}
        every = trials.get(("all", "only"))
        for what, form in (("linears", r"\w+,blocks=\d+"), ("blocks", r"blocks=\d+")):
            both = [
                (row, trials[selector, "only"])
                for (selector, direction), row in trials.items()
                if direction == "except"
                and re.fullmatch(form, selector)
                and (selector, "only") in trials
            ]
            if every is None or len(both) <= ENDS:
                continue
            line = [name(setting), f"{len(both)} {what}"]
            for target in ("kl", "dnll"):
                whole = getattr(every, target)
                gains = [whole - getattr(but, target) for but, _ in both]
                alone = [getattr(only, target) for _, only in both]
                line.append(f"{spearmanr(gains, alone).statistic:.2f}")
                line.append(f"{sum(gains) / whole:.2f}")
                line.append(str(sum(gain < 0 for gain in gains)))
            but, only = max(both, key=lambda pair: pair[0].kl)
            line.append(f"`{but.selector}`: {every.kl - but.kl:+.4f}, alone {only.kl:.4f}")
            rows.append(line)
    heads = [text for target in ("KL", "dNLL") for text in (f"{target}: rank", "sum", "below 0")]
    return table(["", "left out", *heads, "the least KL"], rows)


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


def additivity(results: Results) -> str:
    """Write sets beside sums."""
    parts = []
    points = {}
    for setting, found in results.grid.items():
        whole = [row for row in sets(found) if not row.name.startswith(ALL_BUT)]
        two = [row for row in pairs(found) if not row.first.startswith(ALL_BUT)]
        if not whole:
            continue
        points[name(setting)] = [(row.kl_sum, row.kl, "sets") for row in whole]
        ratios = sorted(row.kl / row.kl_sum for row in whole)
        rank = spearmanr([row.kl for row in whole], [row.kl_sum for row in whole]).statistic
        named = [row for row in whole if row.name in ("all", "attn", "mlp", *ROLES)]
        parts.append(
            f"{name(setting)}: {len(whole)} sets, measured KL over the sum: median "
            f"{ratios[len(ratios) // 2]:.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}; Spearman "
            f"{rank:.3f}."
        )
        if named:
            lines = []
            for r in named:
                numbers = (f"{r.kl:.4f}", f"{r.kl_sum:.4f}", f"{r.kl / r.kl_sum:.2f}")
                lines.append((f"`{r.name}`", str(r.linears), *numbers))
            parts.append(table(["set", "linears", "KL", "sum", "ratio"], lines))
        if two:
            largest = [
                (f"`{r.first}`", f"`{r.second}`", f"{r.kl:.4f}", f"{r.kl_interaction:+.4f}")
                for r in two[:8]
            ]
            heads = ["one", "other", "KL of both", "above the sum"]
            parts.append(f"The largest interactions:\n\n{table(heads, largest)}")
    if points:
        draw_points(points, "KL, nats, over the sum", DOCS / "images/additivity.png", equal=True)
    return "\n\n".join(parts)


def main() -> None:
    results = Results()
    fill(
        PAGE,
        {
            "roles": roles(results),
            "order": order(results),
            "blocks": blocks(results),
            "grid": grid(results),
            "left out": left_out(results),
            "outliers": correlations("outliers.jsonl", STATISTICS),
            "sensitivity": correlations("sensitivity.jsonl"),
            "additivity": additivity(results),
        },
    )


if __name__ == "__main__":
    main()
