"""fp4graph latency: how fast each selection generates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import fp4graph
from fp4graph.cli.common import load_models, print_table, progress_shown
from fp4graph.cli.options import (
    dense_option,
    device_option,
    dtype_option,
    json_option,
    scheme_options,
    selected,
    selection_options,
    weights_option,
)
from fp4graph.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

    import torch


@click.command("latency", short_help="Time generation, dense and in FP4.")
@click.argument("model")
@selection_options
@scheme_options
@click.option("--inner", type=click.Choice(["inductor", "eager"]), default="inductor")
@click.option(
    "--mode",
    type=click.Choice(["default", "reduce-overhead", "max-autotune"]),
    help="Of torch.compile: reduce-overhead captures CUDA graphs, and is the default on GPUs.",
)
@click.option(
    "--attention",
    help="fp4graph, the fastest on CPUs; sdpa; eager. By default the model's own.",
)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--memory/--no-memory",
    default=True,
    help="Whether to load the model once more for each row, to see its memory.",
)
@dtype_option
@dense_option
@weights_option
@device_option
@json_option
def latency_command(
    model: str,
    selects: tuple[str, ...],
    mixes: tuple[Path, ...],
    names: tuple[str, ...],
    calibrations: tuple[Path, ...],
    format: tuple[str, ...],
    activations: tuple[str, ...],
    quantizer: tuple[str, ...],
    inner: str,
    mode: str | None,
    attention: str | None,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    memory: bool,
    dtype: str,
    dense: str | None,
    device: torch.device,
    as_json: bool,
) -> None:
    """Time greedy generation of MODEL, dense and with each selection in FP4, in alternation.

    Of a folder that `fp4graph convert` wrote, the model in it is timed as it is. Memory is that of
    a process for each. Greedy, batch 1, static cache, fixed number of tokens. Compile time is
    reported apart.
    """
    from fp4graph.loading import dense_of
    from fp4graph.study.given import plan_of, read_calibrations

    if mode not in (None, "default") and inner != "inductor":
        raise OptionError(f"--mode {mode} is for --inner inductor")
    select, called = selected(selects, mixes, names)
    if not select and dense_of(model) is None:
        raise OptionError("say what runs in FP4: --select SELECTOR or --mix FILE")
    codes = read_calibrations(calibrations)
    plan_of(select, format, activations, quantizer, called, codes)  # before a model is loaded
    loaded, packed = load_models(model, dtype, device, dense)
    with progress_shown() as progress:
        table = fp4graph.study.latency(
            loaded,
            select,
            format,
            activations,
            quantizer,
            name=called,
            calibration=codes,
            packed=packed,
            inner=inner,
            mode=mode,
            attention=attention,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            memory=memory,
            progress=progress,
        )
    print_table(table, as_json=as_json)
