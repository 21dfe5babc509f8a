"""How time and memory grow: with blocks, width, experts, and trials in a store.

    python bench/growth.py [--picture FILE.png] [--trials 100000]

Each row doubles one thing and keeps the rest. `power` is the exponent of the last doubling: 1 is
linear. Time is the process's own seconds, memory what it peaked at above where it began, each row
in a process of its own. Weights are random, for no accuracy is measured.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import fp4graph
from fp4graph import Policy, Scheme
from fp4graph.calibration.blocks import Blocks
from fp4graph.page import gather
from fp4graph.study.results import open_results, show
from fp4graph.study.store import Store
from fp4graph.study.trial import Row

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = torch.arange(16)[None]


def model(blocks: int = 8, width: int = 64, experts: int = 0) -> Any:
    common = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": blocks,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 256,
    }  # fmt: skip
    kind = MixtralConfig(num_local_experts=experts, **common) if experts else LlamaConfig(**common)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind).eval().requires_grad_(False)


def plan(**sizes: int) -> Callable[[], object]:
    made = model(**sizes)
    return lambda: fp4graph.explain(made, IDS, use_cache=False)


def pack(**sizes: int) -> Callable[[], object]:
    made = model(**sizes)
    select = "all | expert" if sizes.get("experts") else "all"
    return lambda: fp4graph.convert(made, select, kernel="reference")


def run(**sizes: int) -> Callable[[], object]:
    """A trial's worth: one call of the compiled model, tracing and packing included."""
    compiled = torch.compile(model(**sizes), backend=fp4graph.backend(inner="eager"))
    return lambda: compiled(IDS, use_cache=False)


def calibrate(**sizes: int) -> Callable[[], object]:
    made = model(**sizes)
    policy = Policy.of("all", Scheme.of())

    def through() -> None:
        blocks = Blocks(made, [IDS, IDS + 1], policy)
        for number in range(len(blocks)):
            blocks.see(number)
            blocks.advance(number, {})

    return through


def row(number: int) -> Row:
    floats = (
        *("ppl", "dnll", "dnll_se", "kl_se", "top1", "dnll_per_mb", "dnll_low", "dnll_high"),
        *("kl_p50", "kl_p90", "kl_p99", "kl_per_mb", "dnll_per_mparam", "kl_per_mparam"),
    )
    sizes = dict.fromkeys(("linears", "parameters", "bytes_dense", "bytes_packed"), 1000)
    selector = f"{'qkvo'[number % 4]},blocks={number // 4 % 128}"
    if number >= 512:  # the cells of a grid are few; the rest are sets of two
        selector += f" | down,blocks={number // 512}"
    values = {**dict.fromkeys(floats, 0.01), **sizes}
    return Row(selector, "nvfp4", "none", "rtn", "only", kl=0.01 * (1 + number % 97), **values)


def keep(trials: int) -> Callable[[], object]:
    folder = Path(tempfile.mkdtemp())

    def put() -> None:
        store = Store(folder / "trials.sqlite")
        for number in range(trials):
            each = row(number)
            store.put(identity(each), each)
        store.close()

    return put


def identity(each: Row) -> dict[str, Any]:
    facts = {"model": "m", "text": "t", "dtype": "torch.float32", "protocol": 2}
    return {**facts, "selector": each.selector, "quantizer": each.quantizer, "format": "nvfp4"}


def read(trials: int) -> Callable[[], object]:
    folder = Path(tempfile.mkdtemp())
    store = Store(folder / "trials.sqlite")
    store._db.execute("BEGIN")
    for number in range(trials):
        each = row(number)
        store.put(identity(each), each)
    store._db.execute("COMMIT")
    store.close()

    def both() -> None:
        show(open_results(folder))
        gather(folder)

    return both


CASES: dict[str, tuple[Callable[..., Callable[[], object]], str, tuple[int, ...]]] = {
    "plan, by blocks": (plan, "blocks", (16, 32, 64, 128)),
    "plan, by width": (plan, "width", (64, 128, 256, 512)),
    "plan, by experts": (plan, "experts", (16, 32, 64, 128)),
    "convert, by blocks": (pack, "blocks", (16, 32, 64, 128)),
    "convert, by experts": (pack, "experts", (16, 32, 64, 128)),
    "first call, by blocks": (run, "blocks", (16, 32, 64, 128)),
    "block by block, by blocks": (calibrate, "blocks", (16, 32, 64, 128)),
    "keep trials": (keep, "trials", (1, 2, 4, 8)),
    "show and page, by trials": (read, "trials", (1, 2, 4, 8)),
}


def measure(name: str, size: int, answers: Any) -> None:
    make, what, _ = CASES[name]
    call = make(**{what: size})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    call()
    seconds = time.process_time() - start
    answers.put((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3))


def apart(name: str, size: int) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=measure, args=(name, size, answers))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name} of {size} failed")
    found: tuple[float, float] = answers.get()
    return found


def draw(found: dict[str, dict[int, tuple[float, float]]], path: Path) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.add_subplot()
    for number, (name, sizes) in enumerate(found.items()):
        first = min(sizes)
        places = [size / first for size in sizes]
        values = [seconds / sizes[first][0] for seconds, _ in sizes.values()]
        axis.plot(places, values, marker="osD^vPX*h"[number], label=name, linewidth=1)
    axis.plot([1, 8], [1, 8], color="#555555", linestyle="--", label="linear")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlabel("size, over the smallest that was measured")
    axis.set_ylabel("seconds, over those of the smallest")
    axis.set_title("How time grows with size")
    axis.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="How time and memory grow.")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--trials", type=int, default=100_000)
    options = parser.parse_args()
    found: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    print("| what | size | s | MB more | power |\n|---|---|---|---|---|")
    for name, (_, what, sizes) in CASES.items():
        before = None
        for size in sizes:
            size = size * options.trials // 8 if what == "trials" else size
            seconds, megabytes = found[name][size] = apart(name, size)
            power = "" if before is None else f"{math.log2(seconds / before):.2f}"
            before = seconds
            print(f"| {name} | {size} | {seconds:.2f} | {megabytes:.0f} | {power} |", flush=True)
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
