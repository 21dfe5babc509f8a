"""fp4graph latency: how fast each selection generates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.table import Table

from fp4graph import OptionError, Selector
from fp4graph.cli.common import (
    CommaList,
    check_interrupt,
    device_option,
    dtype_option,
    json_option,
    load_model,
    output,
    print_json,
    progress_bar,
    weights_option,
)
from fp4graph.study.latency import LatencyRow, Variant, measure
from fp4graph.study.trial import schemes, trials

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress


class _Bar:
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: Any = None

    def start(self, total: int) -> None:
        self._task = self._bar.add_task("compiling", total=total)

    def advance(self, what: str) -> None:
        check_interrupt()
        self._bar.update(self._task, advance=1, description=what)


@click.command("latency")
@click.argument("model")
@click.option("--select", "selects", multiple=True, required=True, help="Selector; repeatable.")
@click.option("--format", "formats", type=CommaList(), default="nvfp4", show_default=True)
@click.option("--activations", type=click.Choice(["none", "same", "int8"]), default="none")
@click.option(
    "--quantizer",
    "quantizers",
    type=CommaList(),
    default="rtn",
    show_default=True,
    help="Those that need no data; @32 and the like rotate inputs at each call.",
)
@click.option("--inner", type=click.Choice(["inductor", "eager"]), default="inductor")
@click.option(
    "--mode",
    "compile_mode",
    type=click.Choice(["default", "reduce-overhead", "max-autotune"]),
    default="default",
    show_default=True,
    help="Of torch.compile: reduce-overhead captures CUDA graphs.",
)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@dtype_option
@weights_option
@device_option
@json_option
def latency_command(
    model: str,
    selects: tuple[str, ...],
    formats: tuple[str, ...],
    activations: str,
    quantizers: tuple[str, ...],
    inner: str,
    compile_mode: str,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    dtype: str,
    device: torch.device,
    as_json: bool,
) -> None:
    """Time greedy generation of MODEL, dense and with each SELECT in FP4, in alternation.

    Greedy, batch 1, static cache, fixed number of tokens. Compile time is reported apart.
    """
    if compile_mode != "default" and inner != "inductor":
        raise OptionError(f"--mode {compile_mode} is for --inner inductor")
    ways = schemes(formats, [activations], quantizers)
    by_selector = [trials([Selector(text)], ways, ["only"]) for text in selects]
    plan = dict.fromkeys(trial for each in by_selector for trial in each)
    variants = [Variant(trial, inner, compile_mode) for trial in plan]
    loaded = load_model(model, dtype, device)
    with progress_bar() as bar:
        rows = measure(
            loaded.model,
            variants,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            progress=_Bar(bar),
        )
    if as_json:
        for row in rows:
            print_json(row)
    work = f"{prompt_tokens} prompt + {new_tokens} new tokens, {rounds} rounds"
    title = f"{model}, {dtype}, {inner}: {work}"
    output(as_json=as_json).print(_table(rows, title))


def _table(rows: list[LatencyRow], title: str) -> Table:
    recompiles = sum(row.recompiles for row in rows)
    breaks = sum(row.graph_breaks for row in rows)
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        caption="ratio: times faster than dense, median of paired times [95 % bootstrap interval]; "
        "GB/s: linear weights read; RSS holds the dense weights too; "
        f"{recompiles} recompiles after warm-up, {breaks} graph breaks",
    )
    for name in ("selector", "format"):
        table.add_column(name, no_wrap=True)
    for name in ("decode ratio", "prefill ratio"):
        table.add_column(name, no_wrap=True, justify="right")
    for name in (
        "TTFT ms",
        "tok/s",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "MB",
        "GB/s",
        "compile s",
        "RSS MB",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.selector,
            _how(row),
            _ratio(row, "decode"),
            _ratio(row, "prefill"),
            f"{row.ttft_s * 1e3:.1f}",
            f"{row.decode_tokens_per_s:.2f}",
            *(f"{ms:.1f}" for ms in row.per_token_ms.values()),
            f"{row.weight_bytes / 1e6:.1f}",
            f"{row.gb_per_s:.2f}",
            f"{row.compile_s:.1f}",
            f"{row.peak_rss / 1e6:.0f}",
        )
    return table


def _how(row: LatencyRow) -> str:
    if row.format is None:
        return "dense"
    return row.format if row.quantizer == "rtn" else f"{row.format} {row.quantizer}"


def _ratio(row: LatencyRow, phase: str) -> str:
    if row.ratio is None:
        return "1"
    ratio = row.ratio[phase]
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
