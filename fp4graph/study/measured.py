"""What a store holds of a model: which linears each trial had in FP4, and what that did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp4graph import Selector
from fp4graph.study.ablate import PROTOCOL
from fp4graph.study.trial import Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp4graph import Activations
    from fp4graph.linears.tags import LinearTag
    from fp4graph.study.store import Store


@dataclass(frozen=True)
class Measured:
    """Trials that differ in nothing but in which linears were in FP4.

    Attributes:
        text: hash of the text that they were scored on.
        format: of the weights.
        activations: `none` or `same`.
        quantizer: how the codes were found.
        trials: the results, by the paths that were in FP4; of equal sets the first.
    """

    text: str
    format: str
    activations: Activations
    quantizer: str
    trials: dict[frozenset[str], Row]

    @property
    def singles(self) -> dict[str, Row]:
        """The trials of one linear, by its path."""
        return {next(iter(paths)): row for paths, row in self.trials.items() if len(paths) == 1}


def measured(store: Store, revision: str, tags: Sequence[LinearTag]) -> list[Measured]:
    """Return what was measured of a model, setting by setting, by today's protocol.

    Args:
        store: the results.
        revision: of the model, see `LoadedModel.revision`.
        tags: its linears.
    """
    found: dict[str, Measured] = {}
    everything = frozenset(tag.fqn for tag in tags if tag.is_block_linear)
    for identity, result in store.all():
        if identity.get("protocol") != PROTOCOL or identity["model"] != revision:
            continue
        row = Row.of(result)
        if row.format is None:
            continue
        setting = {key: identity[key] for key in sorted(identity.keys() - _OF_A_TRIAL)}
        key = json.dumps(setting)
        if key not in found:
            how = (identity["text"], row.format, row.activations, row.quantizer)
            found[key] = Measured(*how, {})
        selector = Selector(row.selector)
        paths = frozenset(tag.fqn for tag in tags if selector.picks(tag))
        paths = paths if row.direction == "only" else everything - paths
        found[key].trials.setdefault(paths, row)
    return list(found.values())


_OF_A_TRIAL = {"selector", "direction"}


def setting_of(found: Measured) -> dict[str, Any]:
    """Return a setting without its trials, as JSON has it."""
    return {
        "text": found.text,
        "format": found.format,
        "activations": found.activations,
        "quantizer": found.quantizer,
    }
