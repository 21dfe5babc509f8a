"""What `fit` was asked for, and what it did, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp4graph import get_format
from fp4graph.budget.find import schemes_for
from fp4graph.serve.check import check
from fp4graph.study.verdicts import nats
from fp4graph.study.views import is_nothing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fp4graph import Policy, Scheme
    from fp4graph.study.evaluate import Windows
    from fp4graph.study.trial import Row

QUANTIZERS = ("gptq:weighted-scale-search", "gptq")
"""What codes are found with: of those that a format has the first, for they are estimated alike."""


@dataclass(frozen=True)
class Wish:
    """What `fit` is asked for; kept in the folder, so that no other wish is mixed with it.

    Attributes:
        model: its name.
        kind: of the budget.
        value: of the budget.
        formats: what linears may run in beside dense.
        activations: `none` or `same`.
        serve: the engine that is to load it.
        to: layout of the checkpoint.
        corpus: text that damage is estimated on and codes are found with.
        verify_corpus: text that the result is measured on.
    """

    model: str
    kind: str
    value: float
    formats: tuple[str, ...]
    activations: str
    serve: str
    to: str
    corpus: str
    verify_corpus: str

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """What linears may run in beside dense."""
        return schemes_for(self.formats, QUANTIZERS, self.activations)


def summary(
    wish: Wish,
    policy: Policy,
    facts: Mapping[str, Any],
    rows: Sequence[Row],
    texts: tuple[Windows, Windows, Windows],
    out: Path,
) -> str:
    """Return what was done, in words.

    Args:
        wish: what was asked for.
        policy: what runs how.
        facts: of the plan, as `plan.json` has them.
        rows: what was measured: the checkpoint and every uniform format.
        texts: windows that were estimated on, calibrated with, and measured on.
        out: the folder.
    """
    *_, measure = texts
    ours = next(row for row in rows if row.name == "checkpoint")
    dense, now = facts["bytes_dense"], facts["bytes"]
    lines = [
        f"# {wish.model} at {wish.value:g} {wish.kind}",
        "",
        f"- What was chosen: `{policy.text}`.",
        f"- What it saves: block linears take {now / 1e6:.1f} MB instead of "
        f"{dense / 1e6:.1f} MB in 16 bits, {facts['bits']:.3f} bits a weight.",
        f"- What it costs: {nats(ours.kl)} KL a token (+- {nats(ours.kl_se or 0)}), measured "
        f"on {wish.verify_corpus} with the checkpoint as it lies there; "
        f"{1 - ours.top1:.1%} of tokens have another first choice.",
        f"- How sure that is: +- is the standard error between {len(measure.ids)} "
        f"windows; {nats(facts['predicted_kl'])} were predicted for codes to nearest.",
    ]
    lines += [f"- {_beside(ours, row)}." for row in rows if row is not ours]
    _, (verdict,) = check(out / "checkpoint", (wish.serve,))
    said = "loads it as it is" if verdict.loads else f"does not load it: {verdict.why}"
    lines.append(f"- {verdict.engine} {verdict.rules} {said}, by its own rules; not run here.")
    return "\n".join([*lines, "", *_commands(wish, texts, out)]) + "\n"


def _commands(wish: Wish, texts: tuple[Windows, Windows, Windows], out: Path) -> list[str]:
    estimate, calibrate, measure = texts
    (count, length), corpus = calibrate.ids.shape, wish.corpus
    return [
        "The commands that this stands for:",
        "",
        f"    fp4graph policy {wish.model} --{wish.kind} {wish.value!r} "
        f"--format {','.join(wish.formats)} --quantizer {','.join(QUANTIZERS)} "
        f"--activations {wish.activations} --serve {wish.serve} --corpus {corpus} "
        f"{_size(estimate)} --verify 0 --out {out}/policy.toml",
        f"    fp4graph calibrate {wish.model} --mix {out}/policy.toml --corpus {corpus} "
        f"--samples {count} --seq-len {length} --out {out}/calibration.safetensors",
        f"    fp4graph export {wish.model} --policy {out}/policy.toml "
        f"--calibration {out}/calibration.safetensors --to {wish.to} --out {out}/checkpoint",
        f"    fp4graph ablate {out}/checkpoint --dense {wish.model} "
        f"--corpus {wish.verify_corpus} {_size(measure)} --out {out}",
        f"    fp4graph check-serve {out}/checkpoint",
    ]


def _size(windows: Windows) -> str:
    return f"--tokens {windows.ids.numel()} --seq-len {windows.ids.shape[1]}"


def _beside(ours: Row, row: Row) -> str:
    error = math.hypot(ours.kl_se or 0, row.kl_se or 0)
    share = ours.kl / row.kl if row.kl else float("inf")
    bits = 8 * get_format(row.format or "nvfp4").packed_bytes(1, 1 << 20) / (1 << 20)
    kept = (
        f"Beside it, all block linears in {row.format} to nearest, {bits:.2f} bits: "
        f"{nats(row.kl)} (+- {nats(row.kl_se or 0)})"
    )
    if is_nothing(row.kl - ours.kl, error):
        return f"{kept}, which is no different by two errors"
    return f"{kept}; this costs {share:.2f} of it"
