"""What a store holds of a model: which linears each trial had in FP4, and what that did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp4graph import Policy, Scheme
from fp4graph.study.ablate import PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp4graph.linears.tags import LinearTag
    from fp4graph.study.store import Store, Stored
    from fp4graph.study.trial import Row


@dataclass(frozen=True)
class Measured:
    """Trials that differ in nothing but in which linears were in FP4.

    Attributes:
        text: hash of the text that they were scored on.
        corpus: what the text is called; its hash where nobody knows.
        format: of the weights.
        activations: `none` or `same`.
        quantizer: how the codes were found.
        trials: the results, by the paths that were in FP4; of equal sets the first.
    """

    text: str
    corpus: str
    format: str
    activations: str
    quantizer: str
    trials: dict[frozenset[str], Row]

    @property
    def singles(self) -> dict[str, Row]:
        """The trials of one linear, by its path."""
        return {next(iter(paths)): row for paths, row in self.trials.items() if len(paths) == 1}


def is_of(stored: Stored, model: str, protocol: int) -> bool:
    """Whether a trial is of a model, by its revision or its name, and of a protocol."""
    identity = stored.identity
    names = (identity.get("model"), stored.run.get("model_name"))
    return identity.get("protocol") == protocol and model in names


def measured(store: Store, model: str, tags: Sequence[LinearTag]) -> list[Measured]:
    """Return what was measured of a model, setting by setting, by today's protocol.

    Args:
        store: the results.
        model: its revision, see `LoadedModel.revision`, or its name.
        tags: its linears.
    """
    found: dict[str, Measured] = {}
    everything = frozenset(tag.fqn for tag in tags if tag.is_block_linear)
    for stored in store.all():
        if not is_of(stored, model, PROTOCOL):
            continue
        identity, row = stored.identity, stored.row
        if row.format is None or "," in f"{row.format}{row.activations}{row.quantizer}":
            continue  # dense, or a mix of several ways
        setting = {key: identity[key] for key in sorted(identity.keys() - _OF_A_TRIAL)}
        key = json.dumps(setting)
        if key not in found:
            corpus = stored.run.get("corpus") or f"text {identity['text']}"
            how = (identity["text"], corpus, row.format, row.activations, row.quantizer)
            found[key] = Measured(*how, {})
        policy = Policy.read(row.selector, Scheme())
        paths = frozenset(tag.fqn for tag in tags if policy.decide(tag).scheme)
        paths = paths if row.direction == "only" else everything - paths
        found[key].trials.setdefault(paths, row)
    return list(found.values())


_OF_A_TRIAL = {"selector", "direction"}
