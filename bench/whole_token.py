"""Where the time of a token goes: linears, head, attention, other kernels, guards, all else.

    python bench/whole_token.py [MODEL] [--select "all | lm_head"] [--format mxfp4]
        [--activations none] [--dtype bfloat16] [--attention fp4graph] [--prompt 128] [--tokens 64]
        [--rounds 5] [--variants dense,all,select,converted,separate,sdpa,eager]

Variants are the dense model, `all`, the selector, the model that is converted by it; the selector
without the pass `merge`, and with other attention. All run through Inductor with a static cache, as
`fp4graph latency` runs them. A token's time is the median over rounds in which the variants
alternate. Its parts are what torch's profiler counts in one more generation, each event without
those within it. `else` is what is left of the median: Python, the graph's wrapper, allocations. A
plain read is one of as many bytes as the linears have.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from typing import TYPE_CHECKING

import torch
from markdown import table
from plain_read import plain_read
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile, record_function

import fp4graph
from fp4graph import models
from fp4graph.attention import attending
from fp4graph.packed.stale import StaleCheck
from fp4graph.study.latency import Runner, Variant, paired_ratio
from fp4graph.study.trial import DENSE, Trial

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

GUARDS, STALENESS = "TorchDynamo Cache Lookup", "fp4graph staleness"
PARTS = {
    "guards": (GUARDS,),
    "staleness": (STALENESS,),
    "attention": ("cpu_attend", "_scaled_dot_product", "flash", "fmha"),
    "linears": ("fp4graph::", "aten::mm", "aten::addmm", "mkldnn", "mkl_linear", "gemm", "gemv"),
    "other kernels": ("aten::", "cpp_", "triton_", "void at::"),
}
ROWS = ("linears of blocks", "head", "attention", "other kernels", "guards", "staleness")


def part_of(event: FunctionEvent, vocabulary: int) -> str:
    """Return the part that an event belongs to, by its name or that of one around it."""
    around = event
    while around is not None:
        for part, names in PARTS.items():
            if any(name in around.name for name in names):
                if part != "linears":
                    return part
                sizes = {size for shape in around.input_shapes or () for size in shape or ()}
                return "head" if vocabulary in sizes else "linears of blocks"
        around = around.cpu_parent
    return "else"


def parts(runner: Runner, vocabulary: int, tokens: int) -> Counter[str]:
    """Return milliseconds a token by part, as the profiler has them."""
    cuda = runner.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.no_grad(), attending(runner.model, runner.variant.attention):
        runner._cache.reset()
        token = runner.next(runner.prompt)
        with profile(activities=activities, record_shapes=True) as found:
            for _ in range(tokens):
                token = runner.next(token)
    spent: Counter[str] = Counter()
    for event in found.events() or ():
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        spent[part_of(event, vocabulary)] += time / 1e3 / tokens
    return spent


def read_ms(nbytes: int) -> float:
    """Return the milliseconds that a plain read of so many bytes takes."""
    sample = torch.ones(nbytes, dtype=torch.uint8)
    read, times = plain_read(sample), []
    for _ in range(15):
        start = time.perf_counter()
        read(sample)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def column(runner: Runner, vocabulary: int, tokens: int) -> list[float]:
    """Return what the table says of a variant."""
    token = statistics.median(ms * 1e3 for ms in _decode(runner))
    spent = parts(runner, vocabulary, tokens)
    known = [spent[row] for row in ROWS]
    others = token - spent["linears of blocks"] - spent["head"]
    roof = read_ms(runner.weight_bytes)
    return [*known, token - sum(known), token, others, roof, roof / token * 100, 1e3 / token]


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of a token goes.")
    parser.add_argument("model", nargs="?", default=models.SMOLLM2)
    parser.add_argument("--select", default="all | lm_head")
    parser.add_argument("--format", default="mxfp4")
    parser.add_argument("--activations", default="none")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", default="fp4graph")
    parser.add_argument("--variants", default="dense,all,select,converted")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    inductor.cpp.enable_kernel_profile = True
    stale = StaleCheck.__call__

    def recorded(self: StaleCheck, args: object) -> None:
        with record_function(STALENESS):
            stale(self, args)

    StaleCheck.__call__ = recorded  # type: ignore[method-assign]

    def load() -> models.LoadedModel:
        return models.load(options.model, getattr(torch, options.dtype), device=options.device)

    loaded, how = load(), {"format": options.format, "activations": options.activations}
    vocabulary = loaded.model.config.vocab_size
    runners = {}
    for name in options.variants.split(","):
        if name == "converted":
            packed = load()
            fp4graph.convert(packed.model, options.select, **how)
            trial = Trial.of_packed(packed)
        else:
            trial = DENSE if name == "dense" else Trial.of(options.select, **how)
            trial = Trial.of("all", **how) if name == "all" else trial
        os.environ["FP4GRAPH_SKIP"] = "merge" if name == "separate" else ""
        attention = name if name in ("sdpa", "eager") else options.attention
        variant = Variant(trial, "inductor", attention=attention)
        runners[name] = Runner(loaded.model, variant, options.prompt, options.tokens)
        print(f"{name}: compiled in {runners[name].compile_s:.0f} s", flush=True)
    each = list(runners.values())
    for index in range(options.rounds):
        for runner in each[index % len(each) :] + each[: index % len(each)]:
            runner.generate()
    columns = [column(runner, vocabulary, options.tokens - 1) for runner in each]
    names = [*ROWS, "else", "token", "all but linears", "plain read", "share of it, %", "tokens/s"]
    rows = []
    for name, *values in zip(names, *columns, strict=True):
        digits = 1 if name in names[-2:] else 2
        rows.append([name, *(f"{value:.{digits}f}" for value in values)])
    ratios = [paired_ratio(_decode(each[0]), _decode(runner)) for runner in each]
    shown = (f"{r.median:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in ratios)
    rows.append([f"times as fast as {next(iter(runners))}", *shown])
    print(table(["ms", *runners], rows))


def _decode(runner: Runner) -> list[float]:
    return [ms for round in runner.decode_s for ms in round]


if __name__ == "__main__":
    main()
