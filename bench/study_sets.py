"""Tables of the study that set trials beside each other: settings, directions, sums."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from dataclasses import replace

import numpy as np
from markdown import table
from scipy.stats import spearmanr
from study_results import DATA, DOCS, ROLES, SETTINGS, Results, name

from fp4graph.study.additivity import pairs, sets
from fp4graph.study.plot_scores import draw_points

FEWEST = 4
KINDS = {"roles": "|".join(ROLES), "blocks": r"blocks=\d+", "linears": r"\w+,blocks=\d+"}


def agreement(results: Results) -> str:
    """Write how alike two settings rank the linears that both measured, by KL."""
    rows = []
    for one, other in itertools.combinations(filter(results.grid.__contains__, SETTINGS), 2):
        a, b = results.grid[one].singles, results.grid[other].singles
        paths = a.keys() & b.keys()
        if len(paths) >= FEWEST:
            rank = spearmanr([a[p].kl for p in paths], [b[p].kl for p in paths]).statistic
            rows.append((name(one), name(other), str(len(paths)), f"{rank:.2f}"))
    return table(["", "", "linears", "KL: rank"], rows)


def left_out(results: Results) -> str:
    """Write what a role, block or linear gives back if it stays dense, beside what it costs."""
    rows = []
    for setting, (what, form) in itertools.product(SETTINGS, KINDS.items()):
        found = (results.roles if what == "roles" else results.grid).get(setting)
        trials = {(r.selector, r.direction): r for r in found.trials.values()} if found else {}
        both = [
            (row, trials[selector, "only"])
            for (selector, direction), row in trials.items()
            if direction == "except"
            and re.fullmatch(form, selector)
            and (selector, "only") in trials
        ]
        if ("all", "only") not in trials or len(both) < FEWEST:
            continue
        every = trials["all", "only"]
        line = [name(setting), f"{len(both)} {what}"]
        for target in ("kl", "dnll"):
            whole = getattr(every, target)
            gains = np.array([whole - getattr(but, target) for but, _ in both])
            alone = np.array([getattr(only, target) for _, only in both])
            line.append(f"{spearmanr(gains, alone).statistic:.2f}")
            line.append(f"{(gains - alone).std() / alone.std():.2f}")
            line.append(f"{gains.sum() / whole:.2f}")
            line.append(str((gains < 0).sum()))
        but, only = max(both, key=lambda pair: pair[0].kl)
        line.append(f"`{but.selector}`: {every.kl - but.kl:+.4f}, alone {only.kl:.4f}")
        rows.append(line)
    parts = ("rank", "spread", "sum", "below 0")
    heads = [f"{target}: {part}" for target in ("KL", "dNLL") for part in parts]
    return table(["", "left out", *heads, "the least KL"], rows)


def redraws() -> str:
    """Write how far the whole model's damage moves when its activations are rounded anew."""
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for line in (DATA / "redraws.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["format"], row["activations"]].append(row)
    rows = []
    for setting in filter(found.__contains__, SETTINGS):
        line = [name(setting), str(len(found[setting]))]
        for target in ("kl", "dnll"):
            values = np.array([row[target] for row in found[setting]])
            line.append(f"{values.mean():.4f}, {values.std(ddof=1):.2g}")
            line.append(f"{values.min():.4f} to {values.max():.4f}")
        rows.append(line)
    heads = [text for each in ("KL", "dNLL") for text in (f"{each}: mean, spread", "range")]
    return table(["", "draws", *heads], rows)


def additivity(results: Results) -> str:
    """Write sets beside sums."""
    parts = []
    points = {}
    for setting, found in results.grid.items():
        chosen = {  # `left_out` has those of almost everything
            paths: row
            for paths, row in found.trials.items()
            if row.direction == "only" or "blocks" not in row.selector
        }
        whole, two = sets(replace(found, trials=chosen)), pairs(replace(found, trials=chosen))
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
        labels = "sum of the linears' own KL, nats a token", "KL of the set, nats a token"
        title = "SmolLM2-135M: do damages add up?"
        draw_points(points, *labels, title, DOCS / "images/additivity.png", equal=True)
    return "\n\n".join(parts)
