"""What a trial of an ablation costs, by part, beside one dense evaluation of the same text.

    python bench/trial.py [MODEL] --corpus FILE [--tokens 2048] [--format nvfp4] [--every 5]
        [--direction except]

Runs each linear of every 5th block, alone in FP4 or all but it, and prints the mean seconds a trial
of running the graph, of scoring its logits, and of all else: rewriting, packing, statistics, the
store. A dense evaluation comes after the trials of each block; its median is what they are set
beside.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp4graph import Replay, models
from fp4graph.study.ablate import Ablation
from fp4graph.study.evaluate import DenseReference, cut
from fp4graph.study.store import Store
from fp4graph.study.trial import DENSE, Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS: dict[str, list[float]] = defaultdict(list)


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        SECONDS[name].append(time.perf_counter() - start)
        return result

    return call


def seconds(rows: Iterator[Any]) -> float:
    start = time.perf_counter()
    next(rows)
    return time.perf_counter() - start


class Silent:
    def start(self, total: int) -> None: ...
    def advance(self) -> None: ...
    def trial(self, trial: Trial, row: object, *, cached: bool) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description="What a trial of an ablation costs, by part.")
    parser.add_argument("model", nargs="?", default=models.SMOLLM2)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--every", type=int, default=5, help="blocks")
    parser.add_argument("--direction", choices=("only", "except"), default="only")
    options = parser.parse_args()
    loaded = models.load(options.model, torch.float32)
    text = models.corpus(options.corpus, options.tokens * 8)
    windows = cut(text, loaded.tokenizer, options.tokens, 512)
    Replay.run = timed("graph", Replay.run)  # type: ignore[method-assign]
    DenseReference.score = timed("graph and scores", DenseReference.score)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        study = Ablation(loaded, windows, Store(Path(folder) / "trials.sqlite"), Path(folder))
        linears = study.report().selected
        blocks = sorted({row.block for row in linears if row.block is not None})
        some = blocks[options.every // 2 :: options.every]
        paths = [row.path for row in linears if row.block in some]
        plan = [
            DENSE,
            *(
                Trial.of(f"path:{path}", options.format, direction=options.direction)
                for path in paths
            ),
        ]
        rows = study.run(plan, Silent())
        next(rows)
        trials, dense = [], []
        for number in range(1, len(plan)):
            trials.append(seconds(rows))
            if number % (len(paths) // len(some)) == 0:
                store = Store(Path(folder) / f"dense-{number}.sqlite")
                dense.append(
                    seconds(Ablation(loaded, windows, store, Path(folder)).run([DENSE], Silent()))
                )
    graph = sum(SECONDS["graph"]) / len(trials)
    scored = statistics.mean(SECONDS["graph and scores"])
    trial = statistics.mean(trials)
    print(f"{len(trials)} trials of {len(linears)} linears, {options.tokens} tokens")
    whole = statistics.median(dense)
    print(f"dense evaluation  {whole:6.2f} s  from {min(dense):.2f} to {max(dense):.2f}")
    print(f"trial             {trial:6.2f} s  {trial / whole:.3f} of the dense evaluation")
    for name, part in (
        ("graph", graph),
        ("scores", scored - graph),
        ("all else", trial - scored),
    ):
        print(f"  {name:15} {part:6.2f} s  {part / trial:.1%} of the trial")


if __name__ == "__main__":
    main()
