"""What a folder of results says of a selection: as measured, or as the sum of its linears."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING

from fp4graph import Policy, Scheme, Selector
from fp4graph.budget.damage import best_setting
from fp4graph.study.ablate import PROTOCOL
from fp4graph.study.measured import is_of, measured
from fp4graph.study.results import open_results

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from fp4graph.linears.tags import LinearTag
    from fp4graph.study.measured import Measured
    from fp4graph.study.trial import Row

    Way = tuple[str, str, str] | None

_ALL = Selector("all")


@dataclass(frozen=True)
class Cost:
    """What something costs.

    Attributes:
        kl: nats a token.
        error: its standard error.
        how: where that is from, for people.
    """

    kl: float
    error: float
    how: str

    def __str__(self) -> str:
        return f"{self.kl:.4f} +- {self.error:.4f} nats KL a token, {self.how}"


class Known:
    """The trials of one model in a folder of results.

    Args:
        folder: the results.
        model: its name, as the trials were given it, or its revision.
        tags: its linears.

    Raises:
        StudyError: there are no results.
    """

    def __init__(self, folder: Path, model: str, tags: Sequence[LinearTag]) -> None:
        store = open_results(folder)
        self._tags = tags
        self._settings: list[Measured] = measured(store, model, tags)
        self._whole = [each for each in store.all() if is_of(each, model, PROTOCOL)]
        store.close()

    def of(self, policy: Policy) -> Cost | None:
        """Return what a policy costs: a trial of just that, or else the sum of its linears."""
        wanted = self._ways(policy)
        for stored in reversed(self._whole):
            row = stored.row
            if not row.is_dense and self._ways(_policy_of(row)) == wanted:
                text = stored.run.get("corpus") or f"text {stored.identity['text']}"
                return Cost(row.kl, row.kl_se or 0.0, f"measured on {text}")
        chosen = [(tag, policy.decide(tag).scheme) for tag in self._tags]
        return self.alone((tag, scheme) for tag, scheme in chosen if scheme)

    def alone(self, chosen: Iterable[tuple[LinearTag, Scheme]]) -> Cost | None:
        """Return the sum of what linears cost alone; None where one was not measured."""
        rows = []
        for tag, scheme in chosen:
            setting = best_setting(self._settings, scheme)
            row = None if setting is None else setting.singles.get(tag.fqn)
            if row is None:
                return None
            rows.append(row)
        error = math.sqrt(fsum((row.kl_se or 0.0) ** 2 for row in rows))
        how = f"the sum of {len(rows)} linears, each measured alone"
        return Cost(fsum(row.kl for row in rows), error, how)

    def _ways(self, policy: Policy) -> dict[str, Way]:
        found: dict[str, Way] = {}
        for tag in self._tags:
            scheme = policy.decide(tag).scheme
            found[tag.fqn] = None if scheme is None else _way(scheme)
        return found


def _way(scheme: Scheme) -> Way:
    return str(scheme.format), str(scheme.activations), str(scheme.quantizer)


def _policy_of(row: Row) -> Policy:
    """Return what a trial had in FP4, read back from its row."""
    if "," in f"{row.format}{row.activations}{row.quantizer}":
        return Policy.read(row.selector, Scheme())
    scheme = Scheme.read(row.format or "nvfp4", row.quantizer, row.activations, "auto")
    policy = Policy.read(row.selector, scheme)
    if row.direction == "only":
        return policy
    return Policy(((_ALL, scheme), (policy.entries[0][0], None)))
