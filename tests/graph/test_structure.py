"""Blocks, experts and heads by what they are: lists of any name, siblings, the logits."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.closer import relative_l2
from support.nameless import BLOCKS, D, Fused, Letters, PreNorm
from torch import nn
from torch.nn.functional import silu

import fp4graph
from fp4graph.linears.stacks import block_lists, block_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

WORDS = 48
IDS = torch.arange(12).view(2, 6)


class Named(nn.Module):
    """Three blocks in a list of any name, and a head of any name."""

    def __init__(self, block: Callable[[], nn.Module], name: str = "b", head: str = "y") -> None:
        super().__init__()
        self.e = nn.Embedding(WORDS, D)
        owner: nn.Module = self
        *above, self._last = name.split(".")
        for each in above:
            inner = nn.Module()
            setattr(owner, each, inner)
            owner = inner
        setattr(owner, self._last, nn.ModuleList(block() for _ in range(3)))
        self._owner = [owner]
        self._head = head
        setattr(self, head, nn.Linear(D, WORDS, bias=False))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        for block in getattr(self._owner[0], self._last):
            x = block(x)
        return 30 * torch.tanh(getattr(self, self._head)(x) / 30)


def explained(model: nn.Module, *args: Tensor, select: str = "all") -> fp4graph.Report:
    torch._dynamo.reset()
    return fp4graph.explain(model.eval(), *(args or (IDS,)), select=select)


@pytest.mark.parametrize("name", ["b", "stages", "model.tower", "x.y.units"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_list_of_blocks_has_any_name(name: str, block: type[Letters]) -> None:
    torch.manual_seed(0)
    report = explained(Named(block, name))
    for row in report:
        if row.path == "y":
            assert (row.role, row.block) == ("lm_head", None)
            continue
        number, letter = row.path.removeprefix(f"{name}.").split(".")
        assert (row.role, row.block) == (block.roles[letter], int(number))


def test_the_backend_knows_its_blocks_with_and_without_the_model() -> None:
    torch.manual_seed(0)
    model = Named(PreNorm, "b").eval().requires_grad_(False)
    twin = copy.deepcopy(model)
    for name in "abcd":
        linear = getattr(twin.b[2], name)
        linear.weight.copy_(fp4graph.quantize(linear.weight).dequantize())
    twin._owner = [twin]
    for given in (None, model):
        torch._dynamo.reset()
        backend = fp4graph.backend("attn,blocks=-1", inner="eager", model=given)
        with torch.no_grad():
            out = torch.compile(model, backend=backend)(IDS)
        assert {row.path for row in backend.report.selected} == {f"b.2.{x}" for x in "abcd"}
        assert relative_l2(out, twin(IDS)) < 2e-6


def test_a_layer_compiled_alone_has_its_number_from_the_model() -> None:
    torch.manual_seed(0)
    model = Named(PreNorm, "b").eval().requires_grad_(False)
    backend = fp4graph.backend("blocks=1", inner="eager", model=model)
    for block in model.b:
        block.compile(backend=backend)
    with torch.no_grad():
        model(IDS)
    assert {row.path.rpartition(".")[0] for row in backend.report.selected} == {"b.1"}


class Nested(PreNorm):
    """Has a list called `layers` within."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(D, D)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](super().forward(x)))


def test_the_outermost_list_counts() -> None:
    report = explained(Named(Nested, "b"))
    inner = {row.path: row.block for row in report if ".layers." in row.path}
    assert inner == {f"b.{i}.layers.{j}.0": i for i in range(3) for j in range(2)}


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.d = nn.Linear(D, 48, bias=False), nn.Linear(48, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(silu(self.u(x)))


class Mixed(Letters):
    """A router over experts in a list called `layers`, all of which compute."""

    def __init__(self) -> None:
        super().__init__(r=(D, 3))
        self.layers = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weight, chosen = self.r(h).softmax(-1).topk(1)
        for number, expert in enumerate(self.layers):
            x = x + torch.where(chosen == number, weight, 0) * expert(h)
        return x


def test_experts_run_side_by_side_beside_a_router() -> None:
    report = explained(Named(Mixed, "b"), select="expert:down")
    roles = {row.path[4:]: (row.role, row.expert) for row in report if row.block == 1}
    assert roles["r"] == ("router", None)
    assert {roles[f"layers.{i}.u"] for i in range(3)} == {("expert", "up")}
    assert {roles[f"layers.{i}.d"] for i in range(3)} == {("expert", "down")}
    assert len(report.selected) == 9


class Ensemble(nn.Module):
    """Models side by side are no blocks of one."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(WORDS, D)
        self.parts = nn.ModuleList(PreNorm() for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        return sum(part(x) for part in self.parts)


def test_siblings_side_by_side_are_no_blocks() -> None:
    assert {row.block for row in explained(Ensemble(), select="none")} == {None}


class TwoHeads(Named):
    """Gives logits of words, and of three classes."""

    def __init__(self) -> None:
        super().__init__(Fused)
        self.z = nn.Linear(D, 3)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.e(ids)
        for block in self.b:
            x = block(x)
        return self.y(x).float(), self.z(x)


def test_a_head_has_a_row_for_each_of_the_embedding_s() -> None:
    roles = {row.path: row.role for row in explained(TwoHeads())}
    assert (roles["y"], roles["z"]) == ("lm_head", "other")


def test_a_linear_into_the_blocks_is_no_head() -> None:
    class Wide(Named):
        def __init__(self) -> None:
            super().__init__(Fused)
            self.i, self.o = nn.Linear(D, WORDS), nn.Linear(WORDS, D)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.o(self.i(self.e(ids)).relu())
            for block in self.b:
                x = block(x)
            return self.y(x)

    roles = {row.path: row.role for row in explained(Wide())}
    assert (roles["i"], roles["y"]) == ("other", "lm_head")


def test_lists_by_their_members_alone() -> None:
    paths = [f"a.{i}.{x}" for i in range(3) for x in ("q", "up")]
    paths += [f"mlp.{i}" for i in range(3)]  # linears themselves
    paths += [f"pair.{i}.fc" for i in range(2)]  # one linear each
    paths += [f"odd.{i}.{x}{i}" for i in range(2) for x in "qr"]  # never the same
    paths += [f"experts.{i}.{x}" for i in range(2) for x in ("up", "down")]
    lists = block_lists(paths)
    assert lists == {"a"}
    assert block_of("a.2.q", lists) == 2
    assert block_of("mlp.1", lists) is None
    assert block_of("model.layers.4.a.2.q", lists) == 4
