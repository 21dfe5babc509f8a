"""What a plan has to beat at the same budget: uniform, random, by hand, and by others' scores."""

from __future__ import annotations

import math
import random
from math import fsum
from typing import TYPE_CHECKING

from fp4graph.budget.plan import Plan, uniform
from fp4graph.budget.solve import solve
from fp4graph.linears.tags import ROLE_GROUPS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp4graph import Scheme
    from fp4graph.budget.plan import Budget, Choice, Item
    from fp4graph.linears.tags import LinearTag
    from fp4graph.study.sensitivity import SensitivityRow

    Scores = Mapping[tuple[Scheme, LinearTag], SensitivityRow]

RANDOM = 8
_HIGGS = {"attn": 1.2, "mlp": 0.9}


def rivals(items: Sequence[Item], budget: Budget, scores: Scores) -> list[Plan]:
    """Return plans within a budget that are found in other ways.

    - `uniform FORMAT`: all in one way, where that fits.
    - `attention ..., MLP ...`: the best that gives each of both one way, either way round.
    - `greedy`: the choice that saves most damage for its cost, one after the other.
    - `HIGGS`: squared weight error times the weights that llm-compressor 0.15 sets by hand, see its
      issue 3028. They are log(size + 1) * (1 + depth / 20) * (attention 1.2, MLP 0.9).
    - `Fisher`: the score of ModelOpt's auto_quantize, see `SensitivityRow.fisher`.
    - `output error`: squared error of outputs over their square.
    - `random 1` to `random 8`: what fits, in a random order.

    Args:
        items: what to choose for.
        budget: what a plan may cost.
        scores: of each linear in each scheme.
    """
    schemes = list(dict.fromkeys(c.scheme for item in items for c in item.choices if c.scheme))
    found = [uniform(scheme, items, f"uniform {scheme}") for scheme in schemes]
    found += _by_hand(items, budget, schemes)
    found.append(_greedy(items, budget))
    for name, score in SCORES.items():
        found += solve(items, budget, aim=_aim(scores, score), name=name)
    generator = random.Random(0)
    found += [_random(items, budget, generator, f"random {n + 1}") for n in range(RANDOM)]
    return [plan for plan in found if budget.allows(plan)]


def _higgs(tag: LinearTag, row: SensitivityRow) -> float:
    group = next((each for each in _HIGGS if set(tag.parts) & ROLE_GROUPS[each]), "")
    depth = 1 + 0.05 * (tag.block or 0)
    return row.weight_error * math.log(tag.parameters + 1) * depth * _HIGGS.get(group, 1.0)


SCORES: dict[str, Callable[[LinearTag, SensitivityRow], float]] = {
    "HIGGS": _higgs,
    "Fisher": lambda _, row: row.fisher,
    "output error": lambda _, row: row.output_error,
}
"""What other tools choose by, see `rivals`."""


def _aim(
    scores: Scores, score: Callable[[LinearTag, SensitivityRow], float]
) -> Callable[[Item, Choice], float]:
    def aim(item: Item, choice: Choice) -> float:
        if choice.scheme is None:
            return 0.0
        return fsum(score(tag, scores[choice.scheme, tag]) for tag in item.tags)

    return aim


def _by_hand(items: Sequence[Item], budget: Budget, schemes: Sequence[Scheme]) -> list[Plan]:
    """Return the best plan where attention runs in less than the MLPs, and the best opposite."""
    ways: list[Scheme | None] = [None, *schemes]
    found: list[Plan] = []
    for small in ("attn", "mlp"):
        plans = []
        for first in schemes:
            for second in ways:
                plan = _halves(items, small, first, second)
                if budget.allows(plan) and first != second and _smaller(items, first, second):
                    plans.append(plan)
        found += [min(plans, key=lambda plan: plan.kl)] if plans else []
    return found


def _halves(items: Sequence[Item], small: str, first: Scheme, second: Scheme | None) -> Plan:
    large = "MLP" if small == "attn" else "attention"
    name = f"{'attention' if small == 'attn' else 'MLP'} {first}, {large} {second or 'dense'}"
    inside = uniform(first, items, name).chosen
    outside = uniform(second, items, name).chosen
    chosen = tuple(
        mine if set(item.tags[0].parts) & ROLE_GROUPS[small] else other
        for item, mine, other in zip(items, inside, outside, strict=True)
    )
    return Plan(name, tuple(items), chosen)


def _smaller(items: Sequence[Item], first: Scheme, second: Scheme | None) -> bool:
    return uniform(first, items, "").nbytes < uniform(second, items, "").nbytes


def _cheapest(items: Sequence[Item], budget: Budget) -> list[Choice]:
    return [
        min(item.choices, key=lambda each: (budget.cost(each), budget.aim(each))) for item in items
    ]


def _greedy(items: Sequence[Item], budget: Budget) -> Plan:
    """Begin with the cheapest, then take the step that pays most while it fits."""
    chosen = _cheapest(items, budget)
    left = budget.limit(items) - fsum(map(budget.cost, chosen))
    while True:
        best, worth = None, 0.0
        for at, (item, now) in enumerate(zip(items, chosen, strict=True)):
            for choice in item.choices:
                more = budget.cost(choice) - budget.cost(now)
                gain = budget.aim(now) - budget.aim(choice)
                if 0 < more <= left and gain / more > worth:
                    best, worth = (at, choice, more), gain / more
        if best is None:
            return Plan("greedy", tuple(items), tuple(chosen))
        at, choice, more = best
        chosen[at] = choice
        left -= more


def _random(items: Sequence[Item], budget: Budget, generator: random.Random, name: str) -> Plan:
    """Begin with the cheapest, then let items in a random order have a random choice that fits."""
    chosen = _cheapest(items, budget)
    left = budget.limit(items) - fsum(map(budget.cost, chosen))
    places = list(range(len(items)))
    generator.shuffle(places)
    for at in places:
        room = left + budget.cost(chosen[at])
        fits = [
            each
            for each in items[at].choices
            if budget.cost(chosen[at]) <= budget.cost(each) <= room
        ]
        choice = generator.choice(fits)
        left = room - budget.cost(choice)
        chosen[at] = choice
    return Plan(name, tuple(items), tuple(chosen))
