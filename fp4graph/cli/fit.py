"""fp4graph fit: from a model and a budget to a verified checkpoint, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fp4graph.cli.budget_options import budget_options
from fp4graph.cli.common import load_model, output, progress_shown, read_text, stderr
from fp4graph.cli.options import (
    check_trained,
    device_option,
    dtype_option,
    weights_option,
)
from fp4graph.errors import OptionError

if TYPE_CHECKING:
    import torch


@click.command("fit", short_help="All of it: policy, codes, checkpoint, verified.")
@click.argument("model")
@budget_options("nvfp4,fp8")
@click.option("--serve", type=click.Choice(["vllm", "sglang"]), default="vllm", show_default=True,
              help="The engine that is to load it.")  # fmt: skip
@click.option("--to", type=click.Choice(["compressed-tensors", "modelopt"]),
              default="compressed-tensors", show_default=True)  # fmt: skip
@click.option("--corpus", default="pydoc", show_default=True,
              help="The text that damage is estimated on and codes are found with.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=2), default=2048, show_default=True,
              help="Of that text, to estimate on.")  # fmt: skip
@click.option("--samples", type=click.IntRange(min=1), default=64, show_default=True,
              help="Windows to find codes with.")  # fmt: skip
@click.option("--seq-len", type=click.IntRange(min=2), default=512, show_default=True,
              help="Tokens of a window to find codes with and to measure on.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True,
              help="A folder; a run that was stopped goes on where it was.")  # fmt: skip
@dtype_option
@weights_option
@device_option
def fit_command(
    model: str,
    bits: float | None,
    bytes: float | None,
    ms: float | None,
    speedup: float | None,
    kl: float | None,
    format: tuple[str, ...],
    activations: str,
    serve: str,
    to: str,
    corpus: str,
    tokens: int,
    samples: int,
    verify_corpus: str,
    verify_tokens: int,
    seq_len: int,
    out: Path,
    dtype: str,
    device: torch.device,
) -> None:
    """Find the best mix for a budget, find its codes, write it for an engine, and measure it.

    OUT has policy.toml, calibration.safetensors, checkpoint/, all that was measured, and summary.md
    with the commands that this one stands for.
    """
    from fp4graph.budget.fit import Fit
    from fp4graph.budget.plan import Budget
    from fp4graph.budget.summary import Wish
    from fp4graph.study.evaluate import cut

    budget = Budget.of(bits=bits, bytes=bytes, ms=ms, speedup=speedup, kl=kl)
    if corpus == verify_corpus:
        raise OptionError(f"--verify-corpus {corpus}: codes are found with that text")
    wish = Wish(
        model, budget.kind, budget.value, format, activations, serve, to, corpus, verify_corpus
    )
    wish.schemes  # noqa: B018 - which raises what a user can mend, before a model is loaded
    check_trained(model)
    text = read_text(corpus, max(tokens, samples * seq_len))
    other = read_text(verify_corpus, verify_tokens)
    loaded = load_model(model, dtype, device)
    tokenizer = loaded.text_tokenizer()
    texts = (
        cut(text, tokenizer, tokens, max(2, seq_len // 4)),
        cut(text, tokenizer, samples * seq_len, seq_len),
        cut(other, tokenizer, verify_tokens, seq_len),
    )
    with progress_shown() as progress:
        summary = Fit(
            wish, loaded, texts, out, progress, lambda said: stderr.print(said, markup=False)
        ).run()
    output(as_json=False).print(summary, markup=False, soft_wrap=True)
