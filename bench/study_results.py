"""What was measured of SmolLM2-135M, for the tables of docs/studies/smollm2-135m.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fp4graph import Activations, TracedModel, models
from fp4graph.study.measured import Measured, measured
from fp4graph.study.store import Store

DOCS = Path(__file__).parents[1] / "docs"
DATA = DOCS / "studies/smollm2-135m"
ROLES = ("down", "up", "gate", "v", "k", "q", "o")
SETTINGS = [(f, a) for a in ("none", "same") for f in ("nvfp4", "mxfp4")]


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
    return f"{setting[0].upper()} {Activations(setting[1]).mode()}"
