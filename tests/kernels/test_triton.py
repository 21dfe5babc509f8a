"""The portable Triton kernels, in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from support.closer import relative_l2
from torch.nn.functional import linear

import fp4graph
from fp4graph.formats import FORMATS, FP4_FORMATS, FP8
from fp4graph.kernels.triton import layout, tiles
from fp4graph.kernels.triton.tiles import Tile

pytest.importorskip("triton")

from kernels.triton_interpreter import interpret

from fp4graph.kernels.triton import launch

pytestmark = pytest.mark.proof("triton")

HALF = (torch.bfloat16, torch.float16)
TILES = {
    "gemm": Tile(16, 32, 64, 1),
    "gemm, split": Tile(16, 32, 32, 3),
    "gemv": Tile(0, 16, 64, 1),
    "gemv, split": Tile(0, 16, 32, 2),
}
SHAPES = [
    (16, 32, 64),
    (1, 40, 33),
    *(
        pytest.param(*shape, marks=pytest.mark.slow)
        for shape in ((5, 50, 112), (33, 70, 200), (2, 1, 1))
    ),
]


def with_gaps(x: torch.Tensor, fill: float) -> torch.Tensor:
    """Put rows further apart, with what must not be read between them and behind."""
    wide = torch.full((x.shape[0] + 1, x.shape[1] + 7), fill, dtype=x.dtype)
    wide[: x.shape[0], : x.shape[1]] = x
    return wide[: x.shape[0], : x.shape[1]]


def run(
    x: torch.Tensor,
    packed: fp4graph.PackedWeight,
    bias: torch.Tensor | None,
    tile: Tile,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return launch.linear(
        x, *layout.pack(packed), bias, packed.format, tile=tile, dtype=dtype, run=interpret
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_equals_float64(name: str, dtype: torch.dtype, tile: str, m: int, n: int, k: int) -> None:
    if tile.startswith("gemv") and m > 5:
        pytest.skip("the GEMV takes a row a program, which the interpreter takes seconds for")
    generator = torch.Generator().manual_seed(m + n + k)
    packed = fp4graph.quantize(torch.randn(n, k, generator=generator), name)
    x = with_gaps(torch.randn(m, k, generator=generator).to(dtype), torch.nan)
    bias = torch.randn(n, generator=generator).to(dtype) if m % 2 else None
    exact = linear(
        x.double(), packed.dequantize(torch.float64), None if bias is None else bias.double()
    )
    y = run(x, packed, bias, TILES[tile], torch.float32)
    assert relative_l2(y, exact) < 1e-6
    assert torch.equal(y, run(x, packed, bias, TILES[tile], torch.float32))
    assert torch.equal(run(x, packed, bias, TILES[tile]), y.to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("name", FP4_FORMATS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("tile", ["gemm", "gemv"])
def test_every_code_and_scale(name: str, dtype: torch.dtype, tile: str) -> None:
    fmt = fp4graph.get_format(name)
    codes = torch.arange(0x7F if name == "nvfp4" else 0xFF, dtype=torch.uint8)
    nibbles = torch.arange(fmt.block_size, dtype=torch.uint8) % 16
    qdata = (nibbles[0::2] | (nibbles[1::2] << 4)).expand(len(codes), -1).contiguous()
    tensor = torch.tensor(0.25) if name == "nvfp4" else None
    scale = codes[:, None].view(fmt.scale_codec.dtype)
    packed = fp4graph.PackedWeight(qdata, scale, tensor, (len(codes), fmt.block_size), fmt)
    x = torch.eye(fmt.block_size, dtype=dtype)
    y = run(x, packed, None, TILES[tile], torch.float32).T
    expected = packed.dequantize()
    fits = expected.isfinite()
    assert torch.equal(y[fits], expected[fits])


@pytest.mark.parametrize("name", FP4_FORMATS)
def test_nan_scales_make_their_row_nan_and_spread_no_further(name: str) -> None:
    packed = fp4graph.quantize(torch.randn(20, 96), name)
    packed.scale.view(torch.uint8)[3, 1] = 0x7F if name == "nvfp4" else 0xFF
    y = run(torch.randn(4, 96).bfloat16(), packed, None, TILES["gemm"])
    assert y[:, 3].isnan().all()
    assert y[:, [0, 1, 2, *range(4, 20)]].isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_groups_of_very_different_size_in_one_row(name: str) -> None:
    w = torch.randn(8, 128) * torch.logspace(-12, 2, 128)
    packed = fp4graph.quantize(w, name)
    x = torch.randn(3, 128).half()
    exact = linear(x.double(), packed.dequantize(torch.float64))
    assert relative_l2(run(x, packed, None, TILES["gemm"], torch.float32), exact) < 1e-6


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_many_rows_are_the_reference_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    packed = fp4graph.quantize(torch.randn(40, 200) * torch.logspace(-2, 7, 200), name)
    x, bias = torch.randn(257, 200).to(dtype), torch.randn(40).to(dtype)
    y = launch.linear(x, *layout.pack(packed), bias, packed.format, run=interpret)
    assert torch.equal(y, linear(x, packed.dequantize(dtype), bias))


def test_empty_and_many_dimensional_inputs() -> None:
    packed = fp4graph.quantize(torch.randn(8, 48))
    for shape in ((0, 48), (2, 0, 48), (2, 3, 48), (48,)):
        x = torch.randn(shape).bfloat16()
        y = run(x, packed, None, TILES["gemm"], torch.float32)
        assert y.shape == (*shape[:-1], 8)
        if y.numel():
            exact = linear(x.double(), packed.dequantize(torch.float64))
            assert relative_l2(y, exact) < 1e-6


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("tile", ["gemm", "gemv"])
def test_every_code_of_fp8(dtype: torch.dtype, tile: str) -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    scale = torch.tensor([[0.25], [3e-5], [7e8]])
    packed = fp4graph.PackedWeight(codes.expand(3, -1).clone(), scale, None, (3, len(codes)), FP8)
    rows = torch.eye(len(codes), dtype=dtype)[::29]
    y = run(rows, packed, None, TILES[tile], torch.float32).T
    assert torch.equal(y, packed.dequantize()[:, ::29])
    packed.qdata[1, 7] = 0xFF
    y = run(rows, packed, None, TILES[tile], torch.float32)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


def test_packing_is_a_view_of_the_packed_weight() -> None:
    for name in FP4_FORMATS:
        packed = fp4graph.quantize(torch.randn(8, 48), name)
        qdata, scale, row_scale = layout.pack(packed)
        assert torch.equal(qdata, packed.qdata)
        assert torch.equal(scale, packed.scale.view(torch.uint8))
        assert row_scale.shape == (8,)


@pytest.mark.parametrize("m", [1, 2, 3, 16, 17, 64, 65, 4096])
@pytest.mark.parametrize("n, k", [(1, 1), (64, 64), (4096, 14336), (14336, 4096)])
def test_tiles_cover_the_problem(m: int, n: int, k: int) -> None:
    tile = tiles.choose(m, n, k, programs=264)
    assert (tile.rows == 0) == (m <= 2)
    blocks = (m if tile.rows == 0 else -(-m // tile.rows)) * -(-n // tile.columns)
    assert tile.split == 1 or blocks * tile.split <= 264
    assert tile.split == 1 or k >= 4 * tile.depth * tile.split
