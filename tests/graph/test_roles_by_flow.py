"""Roles from the flow of data, in models whose names tell nothing and in those whose names do."""

from __future__ import annotations

import time
from typing import ClassVar

import pytest
import torch
from support.models import FAMILIES, tiny, tokens
from support.nameless import BLOCKS, D, Letters, Model

import fp4graph
from fp4graph import SelectorError
from fp4graph.graph.site import unmark
from fp4graph.linears.tags import Role
from fp4graph.passes import pipeline, tag


def rows(block: type[Letters], select: str = "none") -> list[fp4graph.LinearRow]:
    torch.manual_seed(0)
    return fp4graph.explain(Model(block).eval(), torch.randn(2, 6, D), select=select).rows


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_finds_roles_without_a_telling_name(block: type[Letters]) -> None:
    found = rows(block)
    assert len(found) == 3 * len(block.roles)
    for row in found:
        assert (row.path, row.role) == (row.path, block.roles[row.path[-1]])
        assert row.why not in ("", "its name")


@pytest.mark.parametrize(
    "block",
    [BLOCKS[0], *(pytest.param(block, marks=pytest.mark.slow) for block in BLOCKS[1:])],
    ids=lambda block: block.__name__,
)
def test_selects_by_such_roles(block: type[Letters]) -> None:
    picked = {row.path[-1] for row in rows(block, "all") if row.selected}
    assert picked == {letter for letter, role in block.roles.items() if role != "router"}
    role = next(iter(block.roles.values()))
    report = fp4graph.Report()
    torch.manual_seed(0)
    model = Model(block).eval().requires_grad_(False)
    for given in (None, model):
        torch._dynamo.reset()
        backend = fp4graph.backend(role, model=given, inner="eager", report=report)
        torch.compile(model, backend=backend)(torch.randn(2, 6, D))
        assert {row.path[-1] for row in report.selected} == {
            letter for letter, each in block.roles.items() if each == role
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_tables(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    with torch.no_grad():
        keep = lambda gm, inputs: graphs.append((gm, inputs)) or gm.forward  # noqa: E731
        torch.compile(tiny(family), backend=keep)(tokens(), use_cache=False)
    ((gm, inputs),) = graphs
    tag.TagLinears()(gm, inputs)
    by_name = pipeline.rows(gm)
    unmark(gm)
    monkeypatch.setattr("fp4graph.linears.roles.role_of", lambda path, lists: Role.OTHER)
    tag.TagLinears()(gm, inputs)
    by_flow = pipeline.rows(gm)
    known = [row for row in by_name if row.block is not None and row.role != "expert"]
    assert len(known) > 5
    found = {row.path: row.role for row in by_flow}
    missed = [row.path for row in known if found[row.path] == "other"]
    assert {row.path for row in known if found[row.path] != row.role} == set(missed)
    assert all(path.endswith("shared_expert_gate") for path in missed)


class Mystery(Letters):
    """A linear that no rule knows beside one whose name does."""

    roles: ClassVar = {}

    def __init__(self) -> None:
        super().__init__(q_proj=(D, D), a=(D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.q_proj(self.norm(x)) + self.a(x)


def test_what_no_rule_knows_is_shown_and_left_alone() -> None:
    report = fp4graph.explain(Model(Mystery).eval(), torch.randn(2, 6, D), select="all")
    picked = [row for row in report if row.selected]
    assert [row.role for row in picked] == ["q"] * 3
    unknown = next(row for row in report if row.role == "other")
    assert unknown.reason == (
        "not selected: no rule knows its role, though layers.0.q_proj beside it is selected; "
        "`other` and path: select it"
    )
    assert "3 in blocks have no known role" in report.summary
    other = fp4graph.explain(Model(Mystery).eval(), torch.randn(2, 6, D), select="other")
    assert [row.path for row in other.selected] == ["layers.0.a", "layers.1.a", "layers.2.a"]
    with pytest.raises(SelectorError, match="`other` matches nothing"):
        rows(BLOCKS[0], "other")


@pytest.mark.slow
def test_tagging_a_deep_graph_takes_little_of_its_compile_time() -> None:
    torch.manual_seed(0)
    model = Model(BLOCKS[0]).eval()
    model.layers.extend(BLOCKS[0]() for _ in range(45))
    seconds = []

    def watch(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        start = time.perf_counter()
        tag.TagLinears()(gm, inputs)
        seconds.append(time.perf_counter() - start)
        return gm.forward

    start = time.perf_counter()
    with torch.no_grad():
        torch.compile(model, backend=watch)(torch.randn(1, 4, D))
    traced = time.perf_counter() - start
    assert sum(seconds) < traced / 10, "a fiftieth at the time of writing"
