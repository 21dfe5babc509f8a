"""fp4graph export: a checkpoint that other engines load."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

import fp4graph
from fp4graph.cli.common import load_model, output, read_text, stderr
from fp4graph.cli.options import check_trained, device_option, one_selection, packing_options
from fp4graph.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from fp4graph.checkpoints.export import Exported
    from fp4graph.linears.tags import LinearTag
    from fp4graph.policy import Policy

_SAMPLE = (2048, 256)


@click.command("export", short_help="Write a checkpoint for vLLM and others.")
@click.argument("model")
@packing_options
@click.option(
    "--to",
    type=click.Choice(["compressed-tensors", "modelopt", "gguf"]),
    default="compressed-tensors",
    show_default=True,
)
@click.option(
    "--round",
    "how",
    type=click.Choice(["up", "down"]),
    help="Where the selection cuts what engines compute as one: take the rest in, or leave it out.",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Results of `ablate`: what rounding costs, and what the model card says of damage.",
)
@click.option(
    "--corpus",
    default="pydoc",
    show_default=True,
    help="The text that shows how large inputs are, for W4A4 of NVFP4.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="A new folder; a new file for gguf.",
)
@device_option
def export_command(
    model: str,
    select: str | None,
    mix: Path | None,
    format: str,
    quantizer: str,
    activations: str,
    calibration: Path | None,
    to: str,
    how: str | None,
    store: Path | None,
    corpus: str,
    out: Path,
    device: torch.device,
) -> None:
    """Write MODEL to OUT with its selected linears packed, as vLLM and others load them.

    Files are read, packed and written one by one, OUT whole or not at all. Linears that engines
    compute as one (q k v; gate up; a layer's experts) get one per-tensor scale.
    """
    from fp4graph.checkpoints.export import export
    from fp4graph.compiler import policy_of
    from fp4graph.hf_quantizer import packed_config
    from fp4graph.loading import dense_of
    from fp4graph.models import local_folder
    from fp4graph.skeleton import checkpoint_skeleton
    from fp4graph.study.results import open_results

    known = dense_of(model)
    if known is not None and (select or mix or calibration):
        raise OptionError(f"{model} is packed already: it says itself what runs how")
    what = one_selection(select, mix) or "all"
    wanted = policy_of(what, format, quantizer, activations, "auto", calibration)
    check_trained(model)
    if store is not None:
        open_results(store).close()
    if to == "gguf":
        _to_gguf(model, wanted, out)
        return
    folder = local_folder(model)
    hollow = checkpoint_skeleton(folder)
    config = packed_config(hollow.config)
    wanted = wanted if config is None else config.policy
    inputs = None
    scaled = [each for each in wanted.schemes if each.format.has_per_tensor_scale]
    if any(each.activations == "same" for each in scaled):
        inputs = _ranges(known or model, corpus, device)
    with stderr.status(f"reading {model}") as status:
        done = export(
            folder,
            hollow,
            wanted,
            to,
            out,
            round=how,  # type: ignore[arg-type]
            inputs=inputs,
            progress=lambda read, total: status.update(f"{read / total:.0%} of {model} packed"),
            card=partial(_card, model, known or model, to, calibration, store),
        )
    _say(done, out)
    if store is not None:
        _say_cost(done, wanted, known or model, store)


def _to_gguf(model: str, policy: Policy, out: Path) -> None:
    """Write a GGUF file from a GGUF file.

    Raises:
        OptionError: the model is none.
    """
    import torch

    from fp4graph.checkpoints.ggml import export_gguf
    from fp4graph.models import local_folder, locate
    from fp4graph.skeleton import skeleton

    folder, file = locate(model)
    if file is None:
        raise OptionError(
            f"--to gguf is for GGUF files: llama.cpp's convert_hf_to_gguf.py makes one of {model}"
        )
    hollow = skeleton(local_folder(model), torch.float32)
    with stderr.status(f"reading {file}") as status:
        report = export_gguf(
            Path(folder) / file,
            hollow,
            policy,
            out,
            lambda done, total: status.update(f"{done} of {total} tensors"),
        )
    console = output(as_json=False)
    console.print(report.by_role())
    console.print(f"{out.stat().st_size / 1e6:.1f} MB in {out}", markup=False)


def _ranges(model: str, corpus: str, device: torch.device) -> dict[str, float]:
    """Return the largest magnitude of each linear's inputs on a text."""
    from fp4graph.study.evaluate import cut
    from fp4graph.study.outliers import input_ranges

    tokens, length = _SAMPLE
    loaded = load_model(model, "float32", device)
    positions = getattr(loaded.model.config, "max_position_embeddings", length)
    length = min(length, positions)
    windows = cut(read_text(corpus, tokens), loaded.text_tokenizer(), tokens, length)
    with stderr.status(f"measuring inputs on {tokens} tokens of {corpus}"):
        return input_ranges(loaded, windows)


def _card(
    model: str,
    dense: str,
    to: str,
    calibration: Path | None,
    store: Path | None,
    policy: Policy,
    tags: Sequence[LinearTag],
) -> str:
    """Return the README of what is written: what is in it, and the command that writes it again."""
    from fp4graph.budget.known import Known

    cost = None if store is None else Known(store, dense, tags).of(policy)
    damage = f"Damage: {cost}.\n\n" if cost else ""
    codes = () if calibration is None else ("--calibration", str(calibration))
    select = json.dumps({str(each): scheme and scheme.options for each, scheme in policy.entries})
    command = shlex.join(["fp4graph", "export", model, "--select", select, "--to", to, *codes])
    return (
        f"# {Path(model).name} in FP4\n\n"
        f"What runs how: `{policy}`. All other linears are as in {dense}.\n\n{damage}"
        f"Layout: {to}. fp4graph {fp4graph.__version__} wrote it:\n\n"
        f"    {command} --out FOLDER\n\n"
        "What it costs in accuracy, on a text of yours:\n\n"
        f"    fp4graph ablate FOLDER --dense {dense} --corpus FILE\n"
    )


def _say_cost(done: Exported, wanted: Policy, model: str, store: Path) -> None:
    """Say what the selection costs, and what it was rounded by, as far as results tell."""
    from fp4graph.budget.known import Known

    console, known = output(as_json=False), Known(store, model, done.tags)
    for sign, policy in (("+", done.policy), ("-", wanted)) if done.changed else ():
        ways = [(tag, policy.decide(tag).scheme) for tag in done.changed]
        chosen = [(tag, scheme) for tag, scheme in ways if scheme]
        if chosen:
            cost = known.alone(chosen) or "unknown: single linears were not measured"
            console.print(f"rounding costs {sign}{cost}", markup=False)
    whole = known.of(done.policy) or f"{store} does not tell"
    console.print(f"damage: {whole}", markup=False)


def _say(done: Exported, out: Path) -> None:
    console = output(as_json=False)
    if done.changed:
        names = ", ".join(sorted({tag.fqn.rpartition(".")[2] for tag in done.changed}))
        console.print(
            f"rounded to whole fused sets: {len(done.changed)} linears ({names}); it runs "
            f"{done.policy.text}",
            markup=False,
        )
    console.print(done.report.by_role())
    size = sum(file.stat().st_size for file in out.iterdir())
    console.print(
        f"{size / 1e6:.1f} MB in {out}; linears {done.bytes_dense / 1e6:.1f} -> "
        f"{done.bytes_packed / 1e6:.1f} MB; {done.shared} sets share a per-tensor scale",
        markup=False,
    )
    console.print(f"what engines make of it: fp4graph check-serve {out}", markup=False)
