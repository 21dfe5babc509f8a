"""The wgmma kernel: its compiled PTX, all warps of it, run on numpy."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from support.closer import relative_l2
from torch.nn.functional import linear

import fp4graph
from fp4graph.formats import FP4_FORMATS
from fp4graph.kernels import Target

pytest.importorskip("triton")

from kernels.emulator import Emulator
from kernels.offline import type_of
from kernels.ptx_program import PtxError
from kernels.test_mma import every_code_and_scale, run

from fp4graph.kernels.triton.mma.cut import Unpack
from fp4graph.kernels.triton.mma.wgmma import launch as wgmma
from fp4graph.kernels.triton.mma.wgmma.launch import turned
from fp4graph.kernels.triton.mma.wgmma.tile import Tile, fits, tiles_for

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.proof("triton")

H200 = Target("cuda", "sm_90", 132)
TILES = (Tile(32, 1), Tile(64, 1), Tile(64, 2), Tile(128, 1), Tile(128, 2))
ORDERS = ((), ("wgmma",), ("tma",), ("wgmma", "tma"))
HALF = (torch.bfloat16, torch.float16)


@cache
def emulator(late: tuple[str, ...] = (), seed: int = 0) -> Emulator:
    return Emulator(H200, late=late, seed=seed)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", FP4_FORMATS)
def test_compiled_code_gives_every_weight_bit_for_bit(
    name: str, dtype: torch.dtype, tile: Tile
) -> None:
    packed = every_code_and_scale(name)
    y = run(torch.eye(512, dtype=dtype), packed, "sm_90", tile, run=emulator())
    assert torch.equal(y.T, packed.dequantize())


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", FP4_FORMATS)
def test_equals_float64_whatever_happens_first(name: str, tile: Tile, split: int) -> None:
    generator = torch.Generator().manual_seed(tile.tokens + split)
    m, n, k = tile.tokens - 5, (144, 100)[split - 1], 1024 - 16 * split
    packed = fp4graph.quantize(torch.randn(n, k, generator=generator), name)
    x = torch.randn(m, k, generator=generator).bfloat16()
    bias = torch.randn(n, generator=generator).bfloat16() if tile.blocks == 1 else None
    exact = linear(
        x.double(), packed.dequantize(torch.float64), None if bias is None else bias.double()
    )
    tile = Tile(tile.tokens, tile.blocks, split)
    y = run(x, packed, "sm_90", tile, bias, run=emulator())
    assert relative_l2(y, exact) < 1e-6
    rounded = run(x, packed, "sm_90", tile, bias, run=emulator(ORDERS[-1], 1), dtype=None)
    assert torch.equal(rounded, y.bfloat16())
    for late in ORDERS[1:] if tile.blocks == 2 else ORDERS[-1:]:
        assert torch.equal(run(x, packed, "sm_90", tile, bias, run=emulator(late, 2)), y), late


def early_release(ptx: str) -> str:
    """Let one warpgroup of two give a slot back; barriers of two arrivals come second."""
    return re.sub(r"(mbarrier\.init\S* \[[^\]]+\], )2;", r"\g<1>1;", ptx)


def registers_swapped(ptx: str) -> str:
    return re.sub(
        r"(wgmma\.mma_async[^{]*\{[^}]*\}, \{%?\w+, ?)(%?\w+), ?(%?\w+),",
        r"\1\3, \2,",
        ptx,
        count=1,
    )


FAULTS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "waits for one product too few": (
        lambda ptx: re.sub(r"(wgmma\.wait_group\.sync\.aligned )1;", r"\g<1>2;", ptx),
        ("wgmma",),
    ),
    "registers swapped": (registers_swapped, ()),
    "a slot is given back too soon": (early_release, ()),
    "rotation of scales": (
        lambda ptx: ptx.replace("lop3.b32 s, w, 0x0ff00ff0", "lop3.b32 s, w, 0x0ff00fe0"),
        (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_code_is_caught(fault: str) -> None:
    edit, late = FAULTS[fault]
    packed = fp4graph.quantize(torch.randn(128, 1536))
    x = torch.randn(128, 1536).bfloat16()
    tile = Tile(128, 1)
    right = run(x, packed, "sm_90", tile, run=emulator(late))
    changed = []

    def note(ptx: str) -> str:
        changed.append(edit(ptx) != ptx)
        return edit(ptx)

    try:
        y = run(x, packed, "sm_90", tile, run=Emulator(H200, note, late))
    except PtxError:
        y = None
    assert changed == [True]
    assert y is None or not torch.equal(y, right)


def test_several_programs_of_rows() -> None:
    packed = fp4graph.quantize(torch.randn(40, 256))
    x = torch.randn(3, 50, 256).bfloat16()
    exact = linear(x.double(), packed.dequantize(torch.float64))
    for tile in (Tile(64, 1), Tile(128, 1)):
        assert relative_l2(run(x, packed, "sm_90", tile, run=emulator()), exact) < 1e-6


@pytest.mark.parametrize("block_size", [16, 32])
def test_a_launch_means_what_was_compiled_here(block_size: int) -> None:
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    stream = torch.zeros(4, 3, 1024 + 2048 // block_size, dtype=torch.int32)
    described = wgmma._weight_descriptors(stream, block_size)
    described += tuple(wgmma._copied(torch.zeros(40, 384, dtype=each), 64) for each in HALF)
    backend = type(make_backend(GPUTarget("cuda", 90, 32)))
    for each in described:
        assert native_specialize_impl(backend, each, False, True, True)[0] == type_of(each)


@pytest.mark.parametrize("block_size, columns", [(16, 64), (32, 128)])
def test_pairs_of_quarters_alternate(block_size: int, columns: int) -> None:
    x = torch.arange(2 * columns).view(1, -1)
    pairs = turned(x, block_size).view(2, -1, 2)
    quarter = columns // 4
    assert pairs[0, :5].tolist() == [
        [0, 1],
        [quarter, quarter + 1],
        [2 * quarter, 2 * quarter + 1],
        [3 * quarter, 3 * quarter + 1],
        [2, 3],
    ]
    assert pairs[1, 0].tolist() == [columns, columns + 1]


def test_nan_scales_make_their_row_nan_and_spread_no_further() -> None:
    packed = fp4graph.quantize(torch.randn(20, 96))
    packed.scale.view(torch.uint8)[3, 1] = 0x7F
    y = run(torch.randn(40, 96).bfloat16(), packed, "sm_90", Tile(64, 1), run=emulator())
    assert y[:, 3].isnan().all()
    assert y[:, [0, 1, 2, *range(4, 20)]].isfinite().all()


def test_tiles_worth_timing() -> None:
    assert not list(tiles_for(16, 4096, 4096, H200))
    assert not list(tiles_for(513, 4096, 4096, H200))
    assert not list(tiles_for(64, 4096, 4096, Target("cuda", "sm_100", 148)))
    few = list(tiles_for(20, 4096, 4096, H200))
    assert {each.tokens for each in few} == {32}
    assert {each.split for each in few} == {1, 2, 4}
    many = list(tiles_for(512, 4096, 512, H200))
    assert {(each.tokens, each.blocks) for each in many} == {(t.tokens, t.blocks) for t in TILES}
    assert {each.split for each in many} == {1}
    assert all(fits(each, 4096, 512) for each in many)
    assert fits(Tile(64, 2), 4096, 4096)
    for tile, n in (
        (Tile(96, 1), 4096),
        (Tile(64, 1, 0), 4096),
        (Tile(64, 2, 2), 4096),
        (Tile(64, 2), 100),
    ):
        assert not fits(tile, n, 4096), tile


def test_what_is_unpacked_says_so() -> None:
    assert str(Unpack()) == "unpacked at each call, then F.linear"
    assert str(Tile(64, 2, 4)) == "wgmma 256x64, split 4"
