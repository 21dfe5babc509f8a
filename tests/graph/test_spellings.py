"""Products that are linears by another spelling: each equals the model with rounded weights."""

from __future__ import annotations

import copy

import pytest
import torch
from support.closer import relative_l2
from torch import Tensor, nn

import fp4graph
from fp4graph.errors import RefusalError

N, K = 48, 40
SPELLINGS = {  # the weight's shape, x's, the product
    "W @ x": ((N, K), (3, K, 5), lambda x, w: w @ x),
    "W @ vector": ((N, K), (K,), lambda x, w: w @ x),
    "W.T @ x": ((K, N), (2, 3, K, 5), lambda x, w: w.T @ x),
    "x @ W": ((K, N), (3, 5, K), lambda x, w: x @ w),
    "einsum, K last": ((N, K), (3, 5, K), lambda x, w: torch.einsum("blk,nk->bln", x, w)),
    "einsum, K in the middle": ((K, N), (3, K, 5), lambda x, w: torch.einsum("bkl,kn->bnl", x, w)),
    "einsum, W first": ((N, K), (3, 5, K), lambda x, w: torch.einsum("nk, blk -> bln", w, x)),
    "einsum, N first": ((N, K), (5, K), lambda x, w: torch.einsum("lk,nk->nl", x, w)),
}  # fmt: skip


class Block(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape, _, self.product = SPELLINGS[name]
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up_proj": Block(name)})])
        self.stored_NK = SPELLINGS[name][0] == (N, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0]["up_proj"](x)

    def rounded(self) -> Model:
        twin = copy.deepcopy(self)
        w = twin.layers[0]["up_proj"].weight
        with torch.no_grad():
            q = fp4graph.quantize(w if self.stored_NK else w.T).dequantize(w.dtype)
            w.copy_(q if self.stored_NK else q.T)
        return twin


@pytest.mark.parametrize("name", SPELLINGS)
def test_equals_the_rounded_model(name: str) -> None:
    model, x = Model(name), torch.randn(SPELLINGS[name][1])
    backend = fp4graph.backend("up", inner="eager")
    with torch.no_grad():
        out = torch.compile(model, backend=backend)(x)
        assert relative_l2(out, model.rounded()(x)) < 1e-6
    (row,) = backend.report
    assert (row.path, row.role, row.shape) == ("layers.0.up_proj", "up", (N, K))


def test_activations_are_rounded_along_k() -> None:
    name = "einsum, K in the middle"
    model, x = Model(name), torch.randn(SPELLINGS[name][1])
    with torch.no_grad():
        backend = fp4graph.backend("up", activations="same", inner="eager")
        out = torch.compile(model, backend=backend)(x)
        rounded = fp4graph.NVFP4.fake_quantize(x.movedim(1, -1)).movedim(-1, 1)
        assert relative_l2(out, model.rounded()(rounded)) < 1e-6


@pytest.mark.parametrize(
    "equation, shape",
    [("blk,nk->lbn", (3, 5, K)), ("blk,nk->bl", (3, 5, K)), ("bkk,nk->bn", (3, K, K))],
)
def test_other_sums_are_refused(equation: str, shape: tuple[int, ...]) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(N, K))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x, self.up_proj)

    compiled = torch.compile(Other(), backend=fp4graph.backend("up", inner="eager"))
    with torch.no_grad(), pytest.raises(RefusalError, match="read by einsum"):
        compiled(torch.randn(shape))
