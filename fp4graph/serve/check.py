"""Every linear of a checkpoint as each engine would run it, beside what is on disk."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from fp4graph.errors import OptionError
from fp4graph.serve import rules
from fp4graph.serve.checkpoint import DENSE, read
from fp4graph.serve.layers import layers_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fp4graph.serve.checkpoint import Checkpoint, Linear
    from fp4graph.serve.layers import Layer

    Answers = dict[str, "Answer"]
    Ask = Callable[[Checkpoint, Layer], str | dict[str, str]]

IMPLAUSIBLE = 1000.0
"""No trained linear has weights as large: a per-tensor scale that says so is upside down."""


@dataclass(frozen=True)
class Answer:
    """What an engine makes of a linear.

    Attributes:
        runs: `nvfp4 W4A16`, `dense`, ...; `ERROR` where it refuses or loads what is not there.
        why: the reason of an error, or what a user should know.
    """

    runs: str
    why: str = ""

    @property
    def is_error(self) -> bool:
        """Whether the engine would refuse, or compute something else."""
        return self.runs == ERROR


ERROR = "ERROR"


@dataclass(frozen=True)
class Row:
    """A linear; the fields are the keys of the JSON lines.

    Attributes:
        linear: its path.
        on_disk: `nvfp4`, `mxfp4`, `fp8` or `dense`.
        engines: what each engine makes of it.
    """

    linear: str
    on_disk: str
    engines: Answers


@dataclass(frozen=True)
class Verdict:
    """An engine's whole answer.

    Attributes:
        engine: its name.
        rules: whose rules they are: its version.
        loads: whether it runs what is on disk.
        why: the first reason why not, and how many linears have one.
    """

    engine: str
    rules: str
    loads: bool
    why: str = ""


def check(folder: Path, engines: Sequence[str] = ()) -> tuple[list[Row], list[Verdict]]:
    """Say what engines will make of a checkpoint.

    Args:
        folder: of compressed-tensors' or ModelOpt's layout.
        engines: of `ENGINES`; all without any.

    Returns:
        a row for each linear, and a verdict for each engine.

    Raises:
        ModelError: the folder cannot be read.
        OptionError: no such engine.
    """
    for name in engines:
        if name not in ENGINES:
            raise OptionError(f"--engine {name!r}: expected {', '.join(ENGINES)}")
    checkpoint = read(folder)
    found: dict[str, Answers] = {linear.name: {} for linear in checkpoint.linears}
    for engine in engines or ENGINES:
        for layer in layers_of(checkpoint.linears):
            for name, answer in _answers(ENGINES[engine], checkpoint, layer).items():
                found[name][engine] = answer
    rows = [Row(each.name, each.kind, found[each.name]) for each in checkpoint.linears]
    return rows, [_verdict(engine, rows) for engine in engines or ENGINES]


def _answers(ask: Ask, checkpoint: Checkpoint, layer: Layer) -> Answers:
    try:
        asked = ask(checkpoint, layer)
    except rules.Refused as error:
        return {linear.name: Answer(ERROR, str(error)) for linear in layer.linears}
    if isinstance(asked, str):
        asked = {linear.name: asked for linear in layer.linears}
    return {linear.name: _compared(linear, asked[linear.name], layer) for linear in layer.linears}


def _compared(linear: Linear, runs: str, layer: Layer) -> Answer:
    """Return an engine's answer beside what is on disk: an engine reads what it expects."""
    kind = runs.partition(" ")[0]
    if kind == DENSE != linear.kind:
        return Answer(ERROR, f"taken as dense, and the file has it in {linear.kind}")
    if linear.kind == DENSE != kind:
        return Answer(ERROR, f"taken as {runs}, and the file has it dense")
    if kind != linear.kind:
        return Answer(ERROR, f"taken as {runs}, and the file has it in {linear.kind}")
    if linear.largest is not None and linear.largest > IMPLAUSIBLE:
        problem = f"its per-tensor scale {linear.top:.3g} makes weights as large as"
        return Answer(ERROR, f"{problem} {linear.largest:.3g}: it is upside down")
    tops = {each.top for each in _together(linear, layer)}
    if len(tops) > 1:
        return Answer(
            ERROR, "its fused set has several per-tensor scales, and one is taken for all"
        )
    if "W4A4" in runs and kind == "nvfp4" and not linear.rounds:
        return Answer(ERROR, "taken as W4A4, and the scale of its inputs is missing")
    if runs == rules.MXFP4_ON_VLLM:
        return Answer(runs, "whatever the file says of activations")
    return Answer(runs)


def _together(linear: Linear, layer: Layer) -> list[Linear]:
    """Return the linears of a layer that share one per-tensor scale in the engine."""
    if not layer.is_experts:
        return list(layer.linears)
    first = ("gate_proj", "up_proj", "w1", "w3")
    if linear.last not in first:
        return [linear]
    return [each for each in layer.linears if each.parent == linear.parent and each.last in first]


def _verdict(engine: str, rows: Sequence[Row]) -> Verdict:
    bad = [(row.linear, row.engines[engine].why) for row in rows if row.engines[engine].is_error]
    if not bad:
        return Verdict(engine, _version(engine), loads=True)
    name, why = bad[0]
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return Verdict(engine, _version(engine), loads=False, why=f"{name}: {why}{more}")


def _version(engine: str) -> str:
    if engine in _VERSIONS:
        return _VERSIONS[engine]
    try:
        return version(engine)
    except PackageNotFoundError:
        return "not installed"


_VERSIONS = {
    "vllm": "0.33.0",
    "sglang": "0.5.23",
    "llama.cpp": "converter, by its issues to September 2026",
}


def _transformers(checkpoint: Checkpoint, layer: Layer) -> dict[str, str]:
    if checkpoint.method == "modelopt":
        raise rules.Refused("transformers has no quantizer for ModelOpt's layout")
    if layer.is_experts:
        raise rules.Refused("transformers 5 has experts in one tensor, and draws them at random")
    return rules.compressed_tensors(checkpoint, layer)


def _llama_cpp(checkpoint: Checkpoint, layer: Layer) -> dict[str, str]:
    if len(checkpoint.groups) > 1:
        raise rules.Refused("its converter takes one config group (llama.cpp#26407)")
    kinds = {linear.kind for linear in layer.linears}
    if "mxfp4" in kinds:
        raise rules.Refused("its converter reads NVFP4 of these layouts, not MXFP4")
    runs = {"nvfp4": "nvfp4 W4A16"}
    return {linear.name: runs.get(linear.kind, linear.kind) for linear in layer.linears}


ENGINES: dict[str, Ask] = {
    "vllm": rules.vllm,
    "sglang": rules.sglang,
    "transformers": _transformers,
    "compressed-tensors": rules.compressed_tensors,
    "llama.cpp": _llama_cpp,
}
"""What each engine makes of a layer: one answer, or one for each linear."""
