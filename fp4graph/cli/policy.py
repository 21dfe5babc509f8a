"""fp4graph policy: the best mix for a budget, and what it has to beat, measured."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fp4graph.cli.budget_options import budget_options
from fp4graph.cli.common import load_model, output, print_table, progress_shown, read_text, stderr
from fp4graph.cli.options import (
    CommaList,
    check_trained,
    device_option,
    dtype_option,
    json_option,
    picture_option,
    weights_option,
)
from fp4graph.errors import OptionError

if TYPE_CHECKING:
    import torch


@click.command("policy", short_help="Find the best mix of formats for a budget, and verify it.")
@click.argument("target", metavar="MODEL|STORE")
@budget_options("nvfp4,mxfp4,fp8")
@click.option("--quantizer", type=CommaList(), default="rtn", show_default=True,
              help="How codes are found; of several each is a choice.")  # fmt: skip
@click.option("--serve", type=click.Choice(["vllm", "sglang"]),
              help="Linears that this engine computes as one run in one way.")  # fmt: skip
@click.option("--store", type=click.Path(path_type=Path),
              help="Results of `ablate`, which stand in place of estimates; what is measured here "
              "gathers there.  [default: fp4graph-out/MODEL]")  # fmt: skip
@click.option("--calibration", "calibrations", multiple=True,
              type=click.Path(path_type=Path, dir_okay=False),
              help="Codes that `fp4graph calibrate` found, to verify with.")  # fmt: skip
@click.option("--verify", type=click.IntRange(min=0), default=3, show_default=True,
              help="How many plans to measure, and what they have to beat.")  # fmt: skip
@click.option("--corpus", default="pydoc", show_default=True,
              help="The text that damage is estimated on.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=2), default=2048, show_default=True)
@click.option("--seq-len", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--samples", type=click.IntRange(min=1), default=2, show_default=True,
              help="Random backward passes a window.")  # fmt: skip
@click.option("--rows", type=click.IntRange(min=1), default=1, show_default=True,
              help="Rows of the input that linears are timed with: 1 is decoding.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False),
              help="A .toml file for the plan, as --policy and --mix take it.")  # fmt: skip
@picture_option
@dtype_option
@weights_option
@device_option
@json_option
def policy_command(
    target: str,
    bits: float | None,
    bytes: float | None,
    ms: float | None,
    speedup: float | None,
    kl: float | None,
    format: tuple[str, ...],
    quantizer: tuple[str, ...],
    activations: str,
    serve: str | None,
    store: Path | None,
    calibrations: tuple[Path, ...],
    verify: int,
    corpus: str,
    tokens: int,
    seq_len: int,
    samples: int,
    verify_corpus: str,
    verify_tokens: int,
    rows: int,
    out: Path | None,
    picture: Path | None,
    dtype: str,
    device: torch.device,
    as_json: bool,
) -> None:
    """Find which linears of MODEL run in which format, so that a budget costs least.

    Damage is estimated by `sensitivity`, and taken from STORE where `ablate` measured it. The best
    plans are measured on other text, beside uniform, random and other plans of the same size.
    """
    from fp4graph.budget.file import write_policy
    from fp4graph.budget.find import Request, schemes_for, search
    from fp4graph.budget.plan import Budget
    from fp4graph.budget.verify import compare
    from fp4graph.study.evaluate import cut
    from fp4graph.study.given import read_calibrations, short

    budget = Budget.of(bits=bits, bytes=bytes, ms=ms, speedup=speedup, kl=kl)
    schemes = schemes_for(format, quantizer, activations)
    codes = read_calibrations(calibrations)
    model, out_of, store = _model_and_store(target, store)
    if verify and verify_corpus == corpus:
        raise OptionError(f"--verify-corpus {corpus}: damage is estimated on that text")
    check_trained(model)
    text, other = read_text(corpus, tokens), read_text(verify_corpus, verify_tokens)
    loaded = load_model(model, dtype, device)
    tokenizer = loaded.text_tokenizer()
    windows = cut(text, tokenizer, tokens, seq_len)
    held_out = cut(other, tokenizer, verify_tokens, 4 * seq_len) if verify else None
    cpu = device.type == "cpu"
    request = Request(budget, schemes, serve, store, rows, samples, max(verify, 1), timed=cpu)
    with progress_shown() as progress:
        found = search(loaded, windows, request, progress)
        table = compare(
            found, loaded, held_out, calibrations=codes, out=out_of, corpus=verify_corpus,
            title=f"{loaded.name}, {budget}, {short(verify_corpus if verify else corpus)}",
            progress=progress,
        )  # fmt: skip
    print_table(table, as_json=as_json)
    policy = found.plans[0].policy(found.tags)
    output(as_json=as_json).print(f"plan 1: --select '{policy.text}'", markup=False, soft_wrap=True)
    if picture is not None:
        table.draw(picture)
    if out is not None:
        best = found.plans[0]
        about = (
            f"{shlex.join(['fp4graph', *sys.argv[1:]])}\n{best.bits:.3f} bits, "
            f"{best.nbytes / 1e6:.1f} MB, {best.kl:.4f} +- {best.kl_se:.4f} nats predicted"
        )
        write_policy(policy, out, f"{Path(model).name} {budget}", about)
        stderr.print(f"the plan: {out}", markup=False)


def _model_and_store(target: str, store: Path | None) -> tuple[str, Path, Path | None]:
    """Return the model that a name means, where its results go, and where there are some.

    Raises:
        OptionError: a folder of results, and another one beside it.
        StudyError: there are no results in `store`, or they do not say what model they are of.
    """
    from fp4graph.errors import StudyError
    from fp4graph.study.results import STORE, open_results

    folder = Path(target)
    if not (folder / STORE).is_file():
        if store is not None:
            open_results(store).close()
            return target, store, store
        usual = Path("fp4graph-out") / folder.name
        return target, usual, usual if (usual / STORE).is_file() else None
    if store is not None:
        raise OptionError(f"{target} has results itself: give the model, or no --store")
    results = open_results(folder)
    names = [name for run in results.runs() if (name := run.get("model_name"))]
    results.close()
    if not names:
        raise StudyError(f"{target} does not say which model it is of: give MODEL --store {target}")
    return names[-1], folder, folder
