"""What a trial costs more on a Ray cluster of one worker than here.

    python bench/cluster.py [MODEL]

Trials of single linears, one window: the median time between two results that come one after the
other, on one worker that has all processors, and in this process. And what the head takes to keep a
result.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fp4graph import models
from fp4graph.study import ablate
from fp4graph.study.evaluate import cut
from fp4graph.study.progress import Progress
from fp4graph.study.store import Passage, Store

if TYPE_CHECKING:
    from fp4graph.study.trial import Row


class Times(Progress):
    """Notes when results come."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def ended(self, what: str, row: object, *, kept: bool = False) -> None:
        self.at.append(time.perf_counter())

    @property
    def between(self) -> list[float]:
        """Seconds between results, but for the first few."""
        return [b - a for a, b in zip(self.at[3:], self.at[4:], strict=False)]


def keeping(row: Row) -> float:
    """Return milliseconds that the head takes to keep a result with its passage, median of 300."""
    passage = Passage(np.zeros(256), [" token"] * 256)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "trials.sqlite")
        run = store.begin({})
        for number in range(300):
            start = time.perf_counter()
            store.put({"text": "t", "trial": number}, replace(row, kl=float(number)), run, passage)
            seconds.append(time.perf_counter() - start)
        store.close()
    return 1000 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a trial costs more on a Ray cluster.")
    parser.add_argument("model", nargs="?", default=models.SMOLLM2)
    options = parser.parse_args()
    loaded = models.load(options.model, torch.float32)
    windows = cut(models.corpus("pydoc", 20_000), loaded.tokenizer, 64, 64)
    found: dict[str | None, list[float]] = {None: [], "ray": []}
    for on in (None, "ray") * 3:
        times = Times()
        with tempfile.TemporaryDirectory() as folder:
            table = ablate(
                loaded, windows, [f"down,blocks={block}" for block in range(30)],
                out=Path(folder), on=on, workers=None if on is None else 1, progress=times,
            )  # fmt: skip
        found[on].append(1000 * statistics.median(times.between))
        print(f"{on or 'here':5} {found[on][-1]:.1f} ms a trial")
    print(f"a result kept on the head {keeping(table.rows[-1]):.2f} ms")
    more = [b - a for a, b in zip(found[None], found["ray"], strict=True)]
    print(f"overhead {statistics.median(more):.1f} ms a trial ({min(more):.1f} to {max(more):.1f})")


if __name__ == "__main__":
    main()
