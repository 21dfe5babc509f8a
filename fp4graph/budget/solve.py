"""The knapsack: one choice an item, the least damage within a budget, exactly."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from math import fsum
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array, vstack

from fp4graph import OptionError
from fp4graph.budget.plan import Budget, Choice, Item, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Floats = np.ndarray[Any, np.dtype[np.float64]]

_SECONDS = 120.0
_STEP = 1e-12  # of the budget, by which it is made smaller at first
_APART = 0.05  # of the items that plans after the first differ in from each before


def solve(
    items: Sequence[Item],
    budget: Budget,
    count: int = 1,
    aim: Callable[[Item, Choice], float] | None = None,
    name: str = "plan {}",
) -> list[Plan]:
    """Return the best plans within a budget, the best first.

    Solved by HiGHS to within 1e-6 of the largest damage of a choice; what a plan comes to is then
    added up anew and held against the budget, which it never exceeds. Plans after the first differ
    from each before in 5 % of the items at least: there may be fewer than `count`.

    Args:
        items: what to choose for.
        budget: what a plan may cost.
        count: how many plans.
        aim: what is to be small in place of the budget's own, which is KL.
        name: of the plans; `{}` in it becomes their number.

    Raises:
        OptionError: not even the cheapest choices are within the budget; says what is.
    """
    measure = aim or (lambda _, choice: budget.aim(choice))
    kept = [_useful(item, budget, measure) for item in items]
    limit = budget.limit(items)
    least = fsum(min(budget.cost(choice) for choice in each) for each in kept)
    if least > limit:
        raise OptionError(_too_small(items, budget, least))
    plans: list[Plan] = []
    apart = max(1, round(_APART * len(items)))
    for number in range(count):
        chosen = _solved(items, kept, budget, measure, limit, plans, apart)
        if chosen is None:
            break
        plans.append(Plan(name.format(number + 1), tuple(items), chosen))
    return plans


def _useful(
    item: Item, budget: Budget, measure: Callable[[Item, Choice], float]
) -> tuple[Choice, ...]:
    """Return choices that are not worse than another in both cost and damage."""
    found: list[Choice] = []
    for choice in sorted(item.choices, key=lambda each: (budget.cost(each), measure(item, each))):
        if not found or measure(item, choice) < measure(item, found[-1]):
            found.append(choice)
    return tuple(found)


def _solved(
    items: Sequence[Item],
    kept: Sequence[tuple[Choice, ...]],
    budget: Budget,
    measure: Callable[[Item, Choice], float],
    limit: float,
    before: Sequence[Plan],
    apart: int,
) -> tuple[Choice, ...] | None:
    cost = np.array([budget.cost(choice) for each in kept for choice in each])
    damage = np.array(
        [measure(item, choice) for item, each in zip(items, kept, strict=True) for choice in each]
    )
    owner = np.repeat(np.arange(len(kept)), [len(each) for each in kept])
    one = coo_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    rows, low, high = [csr_array(one)], [1.0] * len(kept), [1.0] * len(kept)
    for plan in before:
        same = [float(choice is plan.chosen[at]) for at, each in enumerate(kept) for choice in each]
        rows.append(csr_array([same]))
        low.append(-np.inf)
        high.append(float(len(kept) - apart))
    scale = float(np.abs(cost).max()) or 1.0
    damage = damage / (float(damage.max()) or 1.0)
    rows.append(csr_array([cost / scale]))
    room = limit / scale
    step = _STEP * max(1.0, room)
    while True:
        bounds = LinearConstraint(vstack(rows), [*low, -np.inf], [*high, room])
        with _without_its_lines():
            found = milp(
                damage,
                integrality=np.ones(len(cost)),
                bounds=Bounds(0, 1),
                constraints=bounds,
                options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
            )
        if found.x is None:  # the cheapest plan is within the budget, if hardly
            return None if before else tuple(min(each, key=budget.cost) for each in kept)
        chosen = _read(found.x, kept)
        over = fsum(budget.cost(each) for each in chosen) - limit
        if over <= 0:
            return chosen
        room -= max(2 * over / scale, step)  # within the solver's tolerance, not the budget
        step *= 8  # for less than a last digit of `room` would change nothing


@contextlib.contextmanager
def _without_its_lines() -> Iterator[None]:
    """Keep back what HiGHS writes to C's stdout in the midst of other programs' JSON."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _read(x: Floats, kept: Sequence[tuple[Choice, ...]]) -> tuple[Choice, ...]:
    chosen, start = [], 0
    for each in kept:
        chosen.append(each[int(x[start : start + len(each)].argmax())])
        start += len(each)
    return tuple(chosen)


def _too_small(items: Sequence[Item], budget: Budget, least: float) -> str:
    if budget.kind == "bits":
        least = 8 * least / sum(item.parameters for item in items)
    elif budget.kind == "ms":
        least /= 1000
    elif budget.kind == "speedup":
        most = budget.limit(items) * budget.value / least
        return f"speedup={budget.value:g}: the most there is, is {most:.2f}"
    return f"{budget.kind}={budget.value:g}: the least there is, is {least:.4g}"
