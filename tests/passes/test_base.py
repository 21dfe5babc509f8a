"""The runner: order, lint, records, dumps."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from support.closer import relative_l2
from torch import fx

import fp4graph
from fp4graph import OptionError
from fp4graph.passes.base import run_passes
from fp4graph.passes.pipeline import plan_passes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def graph() -> fx.GraphModule:
    """Build relu(x) + 1."""
    g = fx.Graph()
    x = g.placeholder("x")
    g.output(g.call_function(torch.add, (g.call_function(torch.relu, (x,)), 1)))
    return fx.GraphModule({}, g)


@dataclass(frozen=True)
class ReluToAbs:
    name: ClassVar[str] = "relu_to_abs"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        for node in gm.graph.nodes:
            if node.target is torch.relu:
                node.target = torch.abs


@dataclass(frozen=True)
class BreakTheGraph:
    name: ClassVar[str] = "break"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        nodes = list(gm.graph.nodes)
        nodes[1].append(nodes[0])  # the input after its use


def test_a_pass_takes_effect_and_leaves_a_record(caplog: pytest.LogCaptureFixture) -> None:
    gm = graph()
    with caplog.at_level(logging.INFO, logger="fp4graph.passes"):
        (record,) = run_passes(gm, (), (ReluToAbs(),))
    assert gm(torch.tensor(-3.0)).item() == 4.0
    assert record.changes == {"abs": (0, 1), "relu": (1, 0)}
    assert record.seconds > 0
    assert "relu: 1 -> 0 (-1)" in caplog.text


def test_a_broken_graph_is_caught_at_once() -> None:
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        run_passes(graph(), (), (BreakTheGraph(), ReluToAbs()))


def test_dumps_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP4GRAPH_DUMP", str(tmp_path / "dump"))
    run_passes(graph(), (), (ReluToAbs(),))
    before, after = (
        next(tmp_path.glob(f"dump/*.relu_to_abs.{when}.txt")) for when in ("before", "after")
    )
    assert "relu" in before.read_text()
    assert "abs" in after.read_text()


def test_a_pass_can_be_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FP4GRAPH_SKIP", "relu_to_abs, other")
    gm = graph()
    assert run_passes(gm, (), (ReluToAbs(),)) == []
    assert gm(torch.tensor(-3.0)).item() == 1.0
    assert "leaves out the pass relu_to_abs" in caplog.text


def test_what_is_left_out_stands_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    monkeypatch.setenv("FP4GRAPH_SKIP", "rotate_inputs")
    options = {"quantizer": "rtn@32", "format": "mxfp4", "inner": "eager"}
    backends = [fp4graph.backend("path:*", **options) for _ in range(2)]
    x = torch.randn(3, 64)
    with torch.no_grad():
        bent = torch.compile(model, backend=backends[0])(x)
        monkeypatch.delenv("FP4GRAPH_SKIP")
        straight = torch.compile(model, backend=backends[1])(x)
        dense = model(x)
    (row,) = backends[0].report
    assert row.reason.endswith("FP4GRAPH_SKIP leaves out rotate_inputs")
    assert relative_l2(bent, dense) > 0.5 > relative_l2(straight, dense)


def test_what_is_no_pass_cannot_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP4GRAPH_SKIP", "rewrites")
    with pytest.raises(OptionError, match="no pass 'rewrites'; passes are tag, select"):
        plan_passes(fp4graph.Policy.of("all", fp4graph.Scheme.of()), "raise")
