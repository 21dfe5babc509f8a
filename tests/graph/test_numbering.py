"""Row numbers through views: equal to views of real numbers, whatever the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.recorder import Recorder

from fp4graph.graph.numbering import Numbering, sizes_of, view

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

VIEWS: dict[str, Callable[[Tensor], Tensor | tuple[Tensor, ...]]] = {
    "heads": lambda y: y.view(2, 3, 4, 3, 8).transpose(1, 2)[..., 1, :],
    "split": lambda y: y.split([32, 48, 16], -1)[1],
    "chunk and merge": lambda y: y.view(6, 96).chunk(3, -1)[2].reshape(2, 3, 4, 8),
    "merged with the batch": lambda y: y.view(2, 3, 4, 24).transpose(1, 2).reshape(8, 3, 24)[1:5],
    "strided": lambda y: y[:, :, 1::2],
    "one": lambda y: y[..., 7],
    "one kept": lambda y: y[..., 7:8].squeeze(-1),
    "unflatten": lambda y: y.unflatten(-1, (3, 4, 8)).unbind(2)[1].flatten(2),
    "tokens first": lambda y: y.permute(1, 0, 2).contiguous().view(3, 2 * 96)[:, 40:150],
    "indexes": lambda y: y[..., [3, 90, 4]],
    "narrow, expand": lambda y: y.narrow(-1, 5, 10)[:, None].expand(2, 7, 3, 10),
    "empty": lambda y: y[..., 96:],
    "T": lambda y: y.view(6, 96).T[8:16],
    "diagonal": lambda y: y.view(2, 3, 4, 24).diagonal(dim1=2, dim2=3),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_equals_views_of_real_numbers(kind: str) -> None:
    record = Recorder()
    torch.compile(lambda x: VIEWS[kind](x + 1) * 1, backend=record, dynamic=False)(
        torch.rand(2, 3, 96)
    )
    assert record.gm is not None
    found = {}
    for node in record.gm.graph.nodes:
        if node.name.startswith("y") or node.target is torch.ops.aten.add or "add" in node.name:
            found[node] = Numbering.of(sizes_of(node) or ())
        elif node.args[:1] and node.args[0] in found and node.op != "output":
            if "mul" in node.name:
                last = found[node.args[0]]
                break
            found[node] = view(node, found[node.args[0]])
            assert found[node] is not None, node
    real = VIEWS[kind](torch.arange(96).expand(2, 3, 96))
    assert isinstance(real, torch.Tensor)
    assert last.sizes == tuple(real.shape)
    assert torch.equal(last.rows, real.flatten().unique())


def test_takes_no_memory_for_tokens() -> None:
    many = Numbering.of((1 << 20, 1 << 12, 96))
    heads = many.reshaped((1 << 32, 4, 24))
    assert heads is not None
    merged = Numbering((1 << 32, 4, 24), heads.columns).reshaped((1 << 34, 24))
    assert merged is not None
    assert torch.equal(merged.rows, torch.arange(96))
    assert sum(len(column) for column in merged.columns if column is not None) == 28


def test_what_is_no_sum_is_not_known() -> None:
    numbering = Numbering((4,), (torch.tensor([0, 1, 2, 5]),))
    assert numbering.reshaped((2, 2)) is None
    assert numbering.reshaped((3,)) is None
