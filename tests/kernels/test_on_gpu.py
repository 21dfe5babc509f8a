"""The Triton kernels on a real GPU, where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.closer import relative_l2
from support.models import tiny, tokens
from torch.nn.functional import linear

import fp4graph
from fp4graph.formats import FORMATS, FP4_FORMATS
from fp4graph.kernels import KERNELS, Kernel, Problem, refusals, target_of
from fp4graph.kernels.scaled_mm import SCALED_MM, rounded
from fp4graph.kernels.triton import mma
from fp4graph.kernels.triton.mma.cut import Cut
from fp4graph.kernels.triton.mma.wgmma.tile import Tile, tiles_for

if TYPE_CHECKING:
    from torch import Tensor

    from fp4graph import PackedWeight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")

EVERY = [kernel for kernel in KERNELS if kernel.name.startswith("triton")]
FRAGMENTS = mma.ops.FRAGMENTS
CUDA = torch.device("cuda")


def prepared(
    kernel: Kernel, name: str, dtype: torch.dtype, n: int, k: int
) -> tuple[PackedWeight, tuple[Tensor, ...]]:
    """Pack a random weight, or skip the test where the kernel refuses."""
    problem = Problem(n, k, FP4_FORMATS[name], dtype, target_of(CUDA))
    if refused := refusals(problem, [kernel]):
        pytest.skip(refused[0])
    generator = torch.Generator().manual_seed(n + k)
    packed = fp4graph.quantize(torch.randn(n, k, generator=generator).to(CUDA), name)
    return packed, kernel.prepack(packed, problem)


@pytest.mark.parametrize("kernel", EVERY, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("name", FP4_FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, k", [(100, 300), (896, 4864), (4096, 4096)])
def test_equals_float64(kernel: Kernel, name: str, dtype: torch.dtype, n: int, k: int) -> None:
    packed, tensors = prepared(kernel, name, dtype, n, k)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(n, generator=generator).to(CUDA, dtype)
    for m in (1, 5, 16, 33, 64, 100, 257):
        x = torch.randn(m, k, generator=generator).to(CUDA, dtype)
        y = kernel.ops[name](x, *tensors, bias)
        exact = linear(x.double(), packed.dequantize(torch.float64), bias.double())
        plain = relative_l2(linear(x, packed.dequantize(dtype), bias), exact)
        assert relative_l2(y, exact) <= 1.05 * plain
        assert torch.equal(y, kernel.ops[name](x, *tensors, bias))


CUTS = {
    "plain": Cut(1, 2, 1, 2, 1, 0),
    "split": Cut(1, 4, 2, 2, 4, 0),
    "16 rows": Cut(2, 2, 2, 1, 16, 0),
    "32 rows": Cut(4, 4, 2, 1, 8, 0),
    "ring of 4": Cut(1, 4, 1, 4, 1, 4, 96),
    "ring of 6": Cut(1, 4, 4, 1, 2, 6, 96),
    "ring, 16 rows": Cut(2, 4, 2, 2, 1, 4, 160),
}
TILES = (Tile(32, 1), Tile(64, 1, 2), Tile(64, 2), Tile(128, 1), Tile(128, 2, 4))


@pytest.mark.parametrize("cut", [*CUTS.values(), *TILES], ids=[*CUTS, *map(str, TILES)])
@pytest.mark.parametrize("name", FP4_FORMATS)
def test_every_cut_is_exact_and_runs_alike_each_time(cut: Cut | Tile, name: str) -> None:
    """A race in the ring, or a sum whose order is not settled, would show among 200 calls."""
    packed, tensors = prepared(FRAGMENTS, name, torch.bfloat16, 2048, 4096)
    rows = 8 * cut.tokens if isinstance(cut, Cut) else cut.tokens + 5
    if isinstance(cut, Tile) and cut not in tiles_for(rows, 2048, 4096, target_of(CUDA)):
        pytest.skip("no wgmma is here")
    run = mma.ops.body(FP4_FORMATS[name], cut=cut, dtype=torch.float32)
    x = torch.randn(rows, 4096, device=CUDA).bfloat16()
    y = run(x, *tensors, None)
    assert relative_l2(y, linear(x.double(), packed.dequantize(torch.float64))) <= 1e-6
    for _ in range(200):
        assert torch.equal(y, run(x, *tensors, None))


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
@pytest.mark.parametrize("m", [1, 17, 300])
def test_codes_by_codes(name: str, m: int) -> None:
    format = FORMATS[name]
    problem = Problem(256, 1024, format, torch.bfloat16, target_of(CUDA), "same")
    if refused := refusals(problem, [SCALED_MM]):
        pytest.skip(refused[0])
    packed = fp4graph.quantize(torch.randn(256, 1024, device=CUDA), name)
    x = torch.randn(m, 1024, device=CUDA).bfloat16()
    x[0, :16] *= 100
    taken = format.quantize_rows(x)
    for ours, expected in zip(rounded(x, format), SCALED_MM.prepack(taken, problem), strict=True):
        assert torch.equal(ours.flatten(), expected.flatten())
    y = SCALED_MM.op_for(problem)(x, *SCALED_MM.prepack(packed, problem), None)
    exact = linear(taken.dequantize(torch.float64), packed.dequantize(torch.float64))
    assert relative_l2(y, exact) <= 2.0**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FP4_FORMATS)
def test_many_rows_are_the_dense_linear_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    packed, tensors = prepared(FRAGMENTS, name, dtype, 1000, 1008)
    x = torch.randn(300, 1008, device=CUDA).to(dtype)
    assert torch.equal(FRAGMENTS.ops[name](x, *tensors, None), linear(x, packed.dequantize(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FP4_FORMATS)
def test_subnormal_activations_count(name: str, dtype: torch.dtype) -> None:
    packed, tensors = prepared(FRAGMENTS, name, dtype, 256, 512)
    x = (torch.randn(4, 512, device=CUDA) * torch.finfo(dtype).tiny / 16).to(dtype)
    assert x.count_nonzero() > x.numel() // 2
    y = mma.ops.body(FP4_FORMATS[name], dtype=torch.float32)(x, *tensors, None)
    exact = linear(x.double(), packed.dequantize(torch.float64))
    assert (y.double() - exact).norm() <= 1e-6 * exact.norm() + 1e-38  # float32 sums


@pytest.mark.parametrize("name", FP4_FORMATS)
def test_nan_and_inf_stay_in_their_rows(name: str) -> None:
    _, tensors = prepared(FRAGMENTS, name, torch.bfloat16, 256, 512)
    x = torch.randn(5, 512, device=CUDA).bfloat16()
    clean = FRAGMENTS.ops[name](x, *tensors, None)
    x[1, 7], x[3, 500] = float("nan"), float("inf")
    y = FRAGMENTS.ops[name](x, *tensors, None)
    assert y[1].isnan().all()
    assert not y[3].isfinite().any()
    assert torch.equal(y[::2], clean[::2])


@pytest.mark.parametrize("kernel", EVERY, ids=lambda kernel: kernel.name)
def test_runs_in_a_cuda_graph(kernel: Kernel) -> None:
    _, tensors = prepared(kernel, "nvfp4", torch.bfloat16, 512, 512)
    x = torch.randn(4, 512, device=CUDA, dtype=torch.bfloat16)
    expected = kernel.ops["nvfp4"](x, *tensors, None)  # compiled outside of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.ops["nvfp4"](x, *tensors, None)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.filterwarnings("ignore")  # Inductor's advice, another on each card
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("name", FP4_FORMATS)
@torch.no_grad()
def test_a_model_runs_on_it(mode: str | None, name: str) -> None:
    model = tiny("llama").to(CUDA, torch.bfloat16)
    ids = tokens().to(CUDA)

    def logits(kernel: str, **options: Any) -> tuple[Tensor, set[str]]:
        torch._dynamo.reset()
        report = fp4graph.Report()
        backend = fp4graph.backend("all", format=name, kernel=kernel, report=report, model=model)
        call = torch.compile(model, backend=backend, **options)
        for _ in range(3):  # "reduce-overhead" records its graph at the second
            found = call(ids).logits.clone()
        return found, {row.kernel for row in report.selected}

    ours, names = logits("auto", mode=mode)
    assert names == {"triton_fragments"}
    assert relative_l2(ours, logits("reference")[0]) <= 0.02
