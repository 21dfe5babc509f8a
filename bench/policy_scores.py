"""How well the scores of others and ours tell what single linears cost, on one measured grid.

    python bench/policy_scores.py [docs/studies/smollm2-135m]

HIGGS is squared weight error times llm-compressor's weights, Fisher the score of ModelOpt's
auto_quantize: see fp4graph/budget/rivals.py. Both are what these tools choose by, here on one text
and one grid. Intervals are 95 %, linears drawn with repeats.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fp4graph
from fp4graph.budget.rivals import SCORES
from fp4graph.study.correlation import correlate
from fp4graph.study.evaluate import cut
from fp4graph.study.measured import measured
from fp4graph.study.results import open_results
from fp4graph.study.sensitivity import Sensitivity, schemes_of

TOKENS, LENGTH = 2048, 128


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/studies/smollm2-135m")
    loaded = fp4graph.models.load("smollm2-135m", torch.float32)
    windows = cut(fp4graph.models.corpus("pydoc"), loaded.text_tokenizer(), TOKENS, LENGTH)
    schemes = schemes_of(("nvfp4", "mxfp4"), ("none", "same"), "rtn")
    found = Sensitivity(loaded, windows, schemes)
    tags = {tag.fqn: tag for tag in found.tags}
    roles = {tag.fqn: str(tag.role) for tag in found.tags}
    print("| grid | linears |", " | ".join([*SCORES, "ours"]), "|")
    print("|---|---|", "|".join("---" for _ in (*SCORES, "ours")), "|")
    for setting in measured(open_results(folder), loaded.revision(), found.tags):
        how = (setting.format, setting.activations, setting.quantizer)
        rows = [row for row in found.rows if (row.format, row.activations, row.quantizer) == how]
        if not rows or len(setting.singles) < len(rows):
            continue
        values = {
            name: {row.path: score(tags[row.path], row) for row in rows}
            for name, score in SCORES.items()
        }
        values["ours"] = {row.path: row.kl for row in rows}
        cells = [
            f"{each.spearman:.2f} ({each.spearman_low:.2f}, {each.spearman_high:.2f})"
            for each in correlate(values, setting, roles)
            if each.target == "kl"
        ]
        mode = {"none": "W4A16", "same": "W4A4"}[setting.activations]
        print(f"| {setting.format} {mode} | {len(rows)} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
