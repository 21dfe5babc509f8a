"""Selectors for sets of linears: the shortest one picks just these."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fp4graph import Selector
from fp4graph.linears.tags import LinearTag, Role
from fp4graph.study.selections import cell_of, kind_of, shortest

TAGS = [
    LinearTag(f"blocks.{block}.{role}", role, block, 6, (8, 8))
    for block in range(6)
    for role in (Role.Q, Role.V, Role.GATE, Role.DOWN)
]
CELLS = [(str(tag.role), tag.block or 0) for tag in TAGS]


@given(st.sets(st.sampled_from(CELLS), min_size=1))
def test_picks_just_these(chosen: set[tuple[str, int]]) -> None:
    selector = Selector(shortest(chosen, CELLS))
    picked = {(str(tag.role), tag.block) for tag in TAGS if selector.picks(tag)}
    assert picked == chosen


def test_says_what_is_left_out_where_that_is_shorter() -> None:
    assert shortest(CELLS, CELLS) == "all"
    assert shortest([], CELLS) == "none"
    assert shortest(set(CELLS) - {("down", 2), ("q", 2)}, CELLS) == "all,!(q,down,blocks=2)"
    assert shortest([("v", 1), ("v", 2)], CELLS) == "v,blocks=1..2"


@pytest.mark.parametrize(
    "selector, kind",
    [
        ("q", "role"), ("blocks=3", "block"), ("q,blocks=3", "role,block"), ("attn", "other"),
        ("blocks<3", "other"), ("all,!(q,blocks=0)", "other"), ('{"all": "nvfp4"}', "other"),
    ],
)  # fmt: skip
def test_kinds(selector: str, kind: str) -> None:
    assert kind_of(selector) == kind
    assert (cell_of(selector) is None) == (kind != "role,block")
