"""The knapsack against every plan there is, and never above its budget."""

from __future__ import annotations

import ctypes
import itertools
import time
from math import fsum
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fp4graph.budget.solve as knapsack
from fp4graph import OptionError, Scheme
from fp4graph.budget.plan import Budget, Choice, Item, Plan, dense_plan, uniform
from fp4graph.budget.solve import solve
from fp4graph.linears.tags import LinearTag, Role

SCHEMES = [Scheme.of("nvfp4"), Scheme.of("mxfp4"), Scheme.of("fp8")]


def tag(block: int, role: Role = Role.Q, shape: tuple[int, int] = (8, 8)) -> LinearTag:
    return LinearTag(f"layers.{block}.{role}", role, block, 99, shape)


def items_of(costs: list[list[tuple[float, int]]]) -> list[Item]:
    """Return items whose choices cost (kl, bytes) each; dense is free of damage, and largest."""
    found = []
    for block, each in enumerate(costs):
        choices = [Choice(None, 0.0, 0.0, 200, 50.0)]
        choices += [
            Choice(scheme, kl, 0.0, nbytes, nbytes / 4)
            for scheme, (kl, nbytes) in zip(SCHEMES, each, strict=False)
        ]
        found.append(Item((tag(block),), tuple(choices)))
    return found


COSTS = st.lists(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 199)), min_size=1, max_size=3),
    min_size=1,
    max_size=5,
)


@given(COSTS, st.floats(0.05, 1.2))
@example([[(1.0, 1), (1e-9, 2)]], 1.0)
@example([[(2.225073858507e-311, 1)]], 1.0)
@settings(deadline=None)
def test_it_is_the_best_of_all_plans(costs: list[list[tuple[float, int]]], share: float) -> None:
    items = items_of(costs)
    budget = Budget("bytes", share * 200 * len(items))
    every = [Plan("", tuple(items), c) for c in itertools.product(*(i.choices for i in items))]
    allowed = [plan for plan in every if budget.allows(plan)]
    if not allowed:
        with pytest.raises(OptionError, match="the least there is"):
            solve(items, budget)
        return
    (found,) = solve(items, budget)
    assert found.nbytes <= budget.value
    largest = max(choice.kl for item in items for choice in item.choices)
    assert found.kl <= min(plan.kl for plan in allowed) + 1e-6 * largest  # HiGHS' own tolerance


@pytest.mark.timeout(60)
def test_a_budget_that_the_best_plan_misses_by_a_last_digit_ends() -> None:
    items = items_of([[(0.1, 100), (0.05, 150)]] * 10)
    limit = float(np.nextafter(1.0, 0))
    (found,) = solve(items, Budget("kl", limit))
    assert found.kl <= limit
    assert found.nbytes == 9 * 100 + 150, "one linear less than what would be above"
    cheapest = [(0.3, 100 - block) for block in range(3)]
    (found,) = solve(items_of([[each] for each in cheapest]), Budget("bytes", 297.0))
    assert found.nbytes == 297, "just within it"


@given(COSTS, st.floats(0.001, 2.0))
@settings(deadline=None)
def test_for_a_kl_it_is_the_smallest(costs: list[list[tuple[float, int]]], kl: float) -> None:
    items = items_of(costs)
    every = [Plan("", tuple(items), c) for c in itertools.product(*(i.choices for i in items))]
    (found,) = solve(items, Budget("kl", kl))
    assert found.kl <= kl
    assert found.nbytes == min(plan.nbytes for plan in every if plan.kl <= kl)


def large(linears: int, choices: int) -> list[Item]:
    generator = np.random.default_rng(0)
    found = []
    for block in range(linears):
        size = int(generator.integers(10**5, 10**7))
        ways = [Choice(None, 0.0, 0.0, 2 * size)]
        for number in range(choices - 1):
            bits = 4.25 + 8 * generator.random()
            kl = float(generator.lognormal(-8, 1.5)) * 2.0**-bits
            ways.append(Choice(SCHEMES[number % 3], kl, 0.0, round(bits / 8 * size)))
        found.append(Item((tag(block, shape=(size, 1)),), tuple(ways)))
    return found


@pytest.mark.parametrize("linears, seconds", [(210, 10), (5000, 60)])
def test_large_models_take_seconds(linears: int, seconds: float) -> None:
    items = large(linears, 8)
    budget = Budget("bits", 6.0)
    start = time.perf_counter()
    (found,) = solve(items, budget)
    assert time.perf_counter() - start < seconds
    assert 5.99 < found.bits <= 6.0
    assert found.kl < solve(items, Budget("bits", 5.9))[0].kl


def test_further_plans_are_worse_and_differ() -> None:
    plans = solve(large(60, 5), Budget("bits", 6.0), 3)
    assert [plan.name for plan in plans] == ["plan 1", "plan 2", "plan 3"]
    assert plans[0].kl <= plans[1].kl <= plans[2].kl
    for one, other in itertools.combinations(plans, 2):
        same = sum(a is b for a, b in zip(one.chosen, other.chosen, strict=True))
        assert same <= 57
    assert all(plan.bits <= 6.0 for plan in plans)


def test_where_there_is_but_one_plan_there_is_one() -> None:
    assert len(solve(items_of([[(0.5, 10)]]), Budget("bytes", 10), 3)) == 1


def test_budgets_are_of_one_kind() -> None:
    items = items_of([[(0.5, 40)], [(0.1, 60)]])
    assert Budget.of(bits=4.0, ms=None).limit(items) == 4 / 8 * 128
    assert Budget.of(ms=0.02).limit(items) == 20
    assert Budget.of(speedup=2.0).limit(items) == fsum([50.0, 50.0]) / 2
    (plan,) = solve(items, Budget("speedup", 1.5))
    assert dense_plan(items).us / plan.us >= 1.5
    for given_ in ({}, {"bits": 4.0, "kl": 1.0}, {"bits": 0.0}, {"ms": float("nan")}):
        with pytest.raises(OptionError, match=r"budget|above zero"):
            Budget.of(**given_)
    with pytest.raises(OptionError, match=r"the most there is, is 4\.00"):
        solve(items, Budget("speedup", 9.0))
    with pytest.raises(OptionError, match=r"bits=1: the least there is, is 6\.25"):
        solve(items, Budget("bits", 1.0))


def test_the_solver_keeps_its_lines_to_itself(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = knapsack.milp

    def talking(*args: Any, **options: Any) -> Any:
        ctypes.CDLL(None).puts(b"HighsMipSolverData: something of its own")
        return real(*args, **options)

    monkeypatch.setattr(knapsack, "milp", talking)
    solve(large(10, 3), Budget("bits", 9.0))
    assert capfd.readouterr().out == ""


def test_policies_say_what_was_chosen() -> None:
    tags = [tag(block, role) for block in range(4) for role in (Role.Q, Role.UP, Role.LM_HEAD)]
    members = [each for each in tags if each.role is not Role.LM_HEAD]
    choices = tuple(Choice(scheme, 0.0, 0.0, 1) for scheme in (None, *SCHEMES))
    items = tuple(Item((each,), choices) for each in members)
    generator = np.random.default_rng(1)
    for _ in range(40):
        chosen = tuple(choices[n] for n in generator.integers(0, 4, len(items)))
        policy = Plan("", items, chosen).policy(tags)
        for item, choice in zip(items, chosen, strict=True):
            assert policy.decide(item.tags[0]).scheme == choice.scheme
        assert not any(policy.decide(each).scheme for each in tags if each.role is Role.LM_HEAD)
    assert uniform(SCHEMES[0], items, "").policy(tags).text == "all"
    some = Plan("", items[:-1], (choices[1],) * (len(items) - 1)).policy(tags)
    assert some.decide(members[-1]).scheme is None
    assert some.decide(members[0]).scheme == SCHEMES[0]
