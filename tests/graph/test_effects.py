"""What nodes do besides making a value, and pieces of graphs that must not begin in between."""

from __future__ import annotations

import math
import types
from typing import TYPE_CHECKING

import pytest
import torch
from support.closer import relative_l2
from support.nets import Net, net
from support.recorder import Recorder
from torch import nn

import fp4graph
from fp4graph import Policy, Replay, Scheme, TracedModel
from fp4graph.formats import MXFP4
from fp4graph.graph.effects import is_pure, under_way
from fp4graph.graph.match import called
from fp4graph.traced.cuts import cuts

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PURE: dict[str, Callable[[Tensor], Tensor]] = {
    "a function": lambda x: torch.exp(x),
    "an operator": lambda x: x * 2 + 1,
    "a method": lambda x: x.view(-1).sum(),
    "of functional": lambda x: nn.functional.silu(x),
    "an index": lambda x: x[0],
    "math": lambda x: x * math.sqrt(x.shape[0]),
}
IMPURE: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "in place": (lambda x: x.mul_(2), "mul_"),
    "drawn": (lambda x: torch.rand_like(x), "rand_like"),
    "dropped": (lambda x: nn.functional.dropout(x), "dropout"),
    "vmap": (lambda x: torch.vmap(torch.exp)(x), "_vmap_increment_nesting"),
}


def graph_of(function: Callable[[Tensor], object]) -> torch.fx.Graph:
    record = Recorder()
    torch.compile(function, backend=record, dynamic=False)(torch.rand(2, 3))
    assert record.gm is not None
    return record.gm.graph


@pytest.mark.parametrize("kind", PURE)
def test_what_is_pure(kind: str) -> None:
    nodes = [n for n in graph_of(PURE[kind]).nodes if n.op not in ("placeholder", "output")]
    assert nodes
    assert all(map(is_pure, nodes))


@pytest.mark.parametrize("kind", IMPURE)
def test_what_is_not(kind: str) -> None:
    function, name = IMPURE[kind]
    (node,) = (n for n in graph_of(function).nodes if called(n) == name)
    assert not is_pure(node)


def test_an_effect_is_under_way_from_its_begin_to_its_end() -> None:
    def function(x: Tensor) -> Tensor:
        x = torch.vmap(torch.exp)(x) + 1
        with torch.no_grad():
            x = x * 2
        with torch.autocast("cpu", torch.bfloat16):
            x = x @ x.T
        return x - 1

    nodes = list(graph_of(function).nodes)
    named = dict(zip(map(called, nodes), under_way(nodes), strict=True))
    assert (named["exp"], named["add"], named["matmul"], named["sub"]) == (True, False, True, False)
    assert named["mul"], "gradients are off there, and on at the end"


class Around(Net):
    """Sets autocast around all of its blocks."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


class Mapped(Net):
    """Maps a function over the batch between its blocks."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.vmap(torch.tanh)(layer(x))
        return x


def test_no_piece_begins_where_autocast_is_set_around_the_blocks() -> None:
    traced = TracedModel(net(cls=Around))
    with torch.no_grad():
        traced(torch.rand(2, 4, 32))
    assert "set around its blocks" in cuts(traced.graphs[0].tagged)


class Language(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.emb, self.net = nn.Embedding(48, 32), inner

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> types.SimpleNamespace:
        return types.SimpleNamespace(logits=self.net(self.emb(input_ids)))


@pytest.mark.parametrize("cls", [Mapped, Around])
def test_pieces_give_what_the_whole_model_gives(cls: type[Net]) -> None:
    torch.manual_seed(0)
    model = Language(net(cls=cls)).eval().requires_grad_(False)
    traced, ids = TracedModel(model), torch.randint(0, 48, (2, 6))
    with torch.no_grad():
        traced(ids)
        replay = Replay(traced, lambda out: out.logits, [{"input_ids": ids}])
        dense = replay.dense(0)
        assert torch.equal(dense, model(ids).logits)
        assert (replay.refusal is None) == (cls is Mapped)
        if replay.refusal is not None:
            return
        for select in ("blocks=0", "blocks=2"):
            policy = Policy.of(select, Scheme(MXFP4))
            replay.select(policy)
            out = replay.run(0)
            traced.select(policy)
            assert torch.equal(out, traced(ids).logits)
            assert not torch.equal(out, dense)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lru_cache.*")
@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_a_model_with_a_scan_in_pieces(kind: str) -> None:
    from support.architectures import build

    model, inputs = build(kind)
    inputs["input_ids"] = inputs["input_ids"][:, :4]  # a scan is traced step by step
    traced = TracedModel(model)
    with torch.no_grad():
        dense = traced(**inputs).logits
        replay = Replay(traced, lambda out: out.logits, [inputs])
        assert torch.equal(replay.dense(0), dense)
        assert replay.refusal is None
        policy = Policy.of("blocks=1", Scheme(MXFP4))
        replay.select(policy)
        out = replay.run(0)
        traced.select(policy)
        assert relative_l2(out, traced(**inputs).logits) == 0
    found = fp4graph.calibrate(model, [inputs], "out_proj", quantizer="weighted-scale-search")
    assert found.packed
