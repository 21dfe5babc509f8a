"""Plans: by name, from a file, in the order that tells most first."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from support.models import tiny, tokens

import fp4graph
from fp4graph import OptionError, SelectorError
from fp4graph.study.plan import PLANS, Group, by_information, read_plan
from fp4graph.study.trial import DENSE, Trial

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def report() -> fp4graph.Report:
    return fp4graph.explain(tiny("llama"), tokens(), select="all", use_cache=False)


@pytest.mark.parametrize(
    "name, count",
    [("roles", 7), ("blocks", 2), ("grid", 14), ("paper", 2 * 2 * (23 + 1 + 23))],
)
def test_plans_by_name(report: fp4graph.Report, name: str, count: int) -> None:
    (group,) = read_plan(name, {})
    plan = group.read().trials(report)
    assert plan[0] == DENSE
    assert len(plan) == len(set(plan)) == 1 + count


def test_what_is_given_stands_above_the_plan(report: fp4graph.Report) -> None:
    (group,) = read_plan("paper", {"format": ("nvfp4",), "direction": "only"})
    assert {trial.facts["format"] for trial in group.read().trials(report)} == {None, "nvfp4"}
    assert PLANS["paper"].format == ("nvfp4", "mxfp4"), "and the plan is as it was"


def test_a_file(report: fp4graph.Report, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[[trials]]\nby = "role"\nformat = ["nvfp4", "mxfp4:rceil"]\n'
        '[[trials]]\nselect = ["down,blocks=-1", "q"]\nactivations = "same"\ndirection = "both"\n'
    )
    first, second = (group.read() for group in read_plan(str(file), {}))
    assert len(first.trials(report)) == 1 + 14
    assert second.trials(report)[1:3] == [
        Trial.of("down,blocks=-1", "nvfp4", "same"),
        Trial.of("q", "nvfp4", "same"),
    ]
    assert len(second.trials(report)) == 1 + 2 + 3


@pytest.mark.parametrize(
    "text, words",
    [
        ("", r"no \[\[trials\]\]"),
        ("[[trials]\n", "cannot read the plan"),
        ("[[trials]]\nselct = 'q'\n", "trials.* 1: no such key 'selct'; keys are select, by"),
        ("[[trials]]\nselect = 3\n", "select is 3, expected a text"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(OptionError, match=words):
        read_plan(str(file), {})


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"expected roles, blocks, grid, paper or a file"):
        read_plan("rolls", {})
    with pytest.raises(OptionError, match="cannot read the plan"):
        read_plan(str(tmp_path / "none.toml"), {})


@pytest.mark.parametrize(
    "group, words",
    [
        (Group(), "just one"),
        (Group(select=("q",), by=("role",)), "just one"),
        (Group(by=("layer",)), "expected role, block"),
        (Group(select=("q",), format=("fp5",)), "formats are"),
        (Group(select=("q",), direction="up"), "expected only, except, both"),
        (Group(select=("q",), activations=("int3",)), "expected None, 'none'"),
    ],
)
def test_groups_are_checked_without_a_model(group: Group, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        group.read()


def test_a_bad_selector_in_a_plan_is_an_error() -> None:
    with pytest.raises(SelectorError, match="did you mean 'attn'"):
        Group(select=("atn",)).read()


def test_large_sets_come_first_then_blocks_far_apart() -> None:
    grid = [Trial.of(f"q,blocks={block}", "nvfp4") for block in range(8)]
    plan = [DENSE, *grid, Trial.of("q", "nvfp4"), Trial.of("all", "nvfp4")]
    sizes = dict.fromkeys(grid, 1) | {DENSE: 99, plan[-2]: 8, plan[-1]: 56}
    ordered = by_information(plan, sizes)
    assert ordered[:3] == [DENSE, plan[-1], plan[-2]]
    blocks = [int(trial.select.text.partition("=")[2]) for trial in ordered[3:]]
    assert sorted(blocks) == list(range(8))
    assert all(abs(a - b) >= 2 for a, b in pairwise(blocks[:4]))
