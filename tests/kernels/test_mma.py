"""The fragment kernels: their layout, and their compiled PTX run on numpy."""

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
from fp4graph.formats.minifloat import E2M1
from fp4graph.kernels import Target
from fp4graph.kernels.triton.mma import layout
from fp4graph.kernels.triton.mma.cut import Cut, choose

pytest.importorskip("triton")

from kernels.emulator import Emulator
from kernels.on_cpu import stand_in
from kernels.triton_interpreter import interpret

from fp4graph.kernels.triton.mma import launch

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.proof("triton")

TARGETS = {arch: Target("cuda", arch, 1) for arch in ("sm_80", "sm_90", "sm_100", "sm_120")}
HALF = (torch.bfloat16, torch.float16)
PLAIN = Cut(tokens=2, tiles=4, wn=4, wk=1, split=1, ring=0)
CUTS = {
    "8 tokens": (5, Cut(1, 4, 4, 1, 1, 0)),
    "16 tokens": (16, Cut(2, 4, 2, 2, 1, 0)),
    "split": (9, Cut(2, 4, 1, 2, 2, 0)),
    "8 tokens, half a record": (8, Cut(1, 2, 1, 2, 1, 0)),
    "32 tokens": (27, Cut(4, 4, 2, 1, 1, 0)),
    "70 tokens by 32, split": (70, Cut(4, 2, 4, 1, 2, 0)),
    "ring": (3, Cut(1, 4, 2, 1, 1, 4)),
    "ring, split": (11, Cut(2, 4, 1, 2, 2, 4)),
}


@cache
def emulator(arch: str) -> Emulator:
    return Emulator(TARGETS[arch])


def every_code_and_scale(name: str, n: int = 256, k: int = 512) -> fp4graph.PackedWeight:
    """A weight with all 16 codes under scales from all over the format's range."""
    format = FP4_FORMATS[name]
    generator = torch.Generator().manual_seed(n)
    scales = (n, k // format.block_size)
    if name == "nvfp4":
        bits = torch.randint(0, 0x7F, scales, generator=generator, dtype=torch.uint8)
    else:
        bits = torch.randint(104, 128, scales, generator=generator, dtype=torch.uint8)
        bits[:, 0] = 127  # the row's largest, so that nothing is beyond float16
    qdata = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    tensor = torch.tensor(2.0**-8) if name == "nvfp4" else None
    return fp4graph.PackedWeight(qdata, bits.view(format.scale_codec.dtype), tensor, (n, k), format)


def run(
    x: torch.Tensor,
    packed: fp4graph.PackedWeight,
    arch: str,
    cut: Cut | None,
    bias: torch.Tensor | None = None,
    run: Callable[[object], object] | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> torch.Tensor:
    order = layout.order_of(x.dtype, TARGETS[arch])
    stream, row_scale = layout.pack(packed, order)
    return launch.linear(
        x, stream, row_scale, bias, order, packed.format.block_size, TARGETS[arch],
        cut=cut, dtype=dtype, run=run or emulator(arch),
    )  # fmt: skip


@pytest.mark.parametrize("order", layout.ORDERS)
@pytest.mark.parametrize("name", FP4_FORMATS)
@pytest.mark.parametrize("n, k", [(256, 512), (64, 128), (100, 300), (1, 1)])
def test_unpacking_undoes_packing(order: str, name: str, n: int, k: int) -> None:
    packed = every_code_and_scale(name) if n == 256 else fp4graph.quantize(torch.randn(n, k), name)
    stream, row_scale = layout.pack(packed, layout.ORDERS[order])
    assert stream.shape == (-(-n // 64), -(-k // 128), 1024 + 2048 // packed.format.block_size)
    codes, scale = layout.unpack(
        stream, row_scale, (n, k), packed.format.block_size, layout.ORDERS[order]
    )
    dense = E2M1.decode(codes) * scale.repeat_interleave(packed.format.block_size, 1)[:, :k]
    assert torch.equal(dense, packed.dequantize())
    expected = torch.stack((packed.qdata & 15, packed.qdata >> 4), -1).flatten(1)[:, :k]
    zero = packed.scale.float().repeat_interleave(packed.format.block_size, 1)[:, :k] == 0
    assert torch.equal(codes, expected.masked_fill(zero, 0))


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", FP4_FORMATS)
def test_compiled_code_gives_every_weight_bit_for_bit(
    arch: str, dtype: torch.dtype, name: str
) -> None:
    packed = every_code_and_scale(name)
    dense = packed.dequantize()
    one_hot = torch.eye(512, dtype=dtype)
    for first in range(0, 512, 16):
        y = run(one_hot[first : first + 16], packed, arch, PLAIN)
        assert torch.equal(y.T, dense[:, first : first + 16])


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", FP4_FORMATS)
@pytest.mark.parametrize(
    "arch, dtype",
    [
        ("sm_80", torch.bfloat16),
        *(
            pytest.param(arch, dtype, marks=pytest.mark.slow)
            for arch in TARGETS
            for dtype in HALF
            if (arch, dtype) != ("sm_80", torch.bfloat16)
        ),
    ],
    ids=str,
)
def test_equals_float64(arch: str, dtype: torch.dtype, name: str, cut: str) -> None:
    m, constants = CUTS[cut]
    n, k = 100, 512 - 16 * m % 128
    generator = torch.Generator().manual_seed(m)
    packed = fp4graph.quantize(torch.randn(n, k, generator=generator), name)
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if m % 2 else None
    exact = linear(
        x.double(), packed.dequantize(torch.float64), None if bias is None else bias.double()
    )
    y = run(x, packed, arch, constants, bias)
    assert relative_l2(y, exact) < 1e-6
    assert torch.equal(run(x, packed, arch, constants, bias, dtype=None), y.to(dtype))


FAULTS = {
    "mask": lambda ptx: ptx.replace("0x81c081c0", "0x81808180", 1),
    "registers swapped": lambda ptx: re.sub(
        r"(mma\S+ \{[^}]*\}, \{)(a\d+, )(a\d+, )(a\d+, )", r"\1\2\4\3", ptx, count=1
    ),
    "rotation of scales": lambda ptx: re.sub(
        r"(shf.l.wrap.b32 t, (%r\d+), \2, )8;", r"\g<1>16;", ptx
    ),
    "scales swapped": lambda ptx: ptx.replace("mov.b32 lo, {g, g}", "mov.b32 lo, {h, h}", 1),
    "leftover mask": lambda ptx: ptx.replace("0x06030603", "0x06020603"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_code_is_caught(fault: str) -> None:
    packed = every_code_and_scale("nvfp4", 64, 128)
    columns = [each + i for each in (0, 50, 64, 114) for i in range(4)]
    x = torch.eye(128, dtype=torch.bfloat16)[columns]
    changed = []

    def edit(ptx: str) -> str:
        changed.append(FAULTS[fault](ptx) != ptx)
        return FAULTS[fault](ptx)

    y = run(x, packed, "sm_90", PLAIN, run=Emulator(TARGETS["sm_90"], edit))
    assert changed == [True]
    assert not torch.equal(y.T, packed.dequantize()[:, columns])


@pytest.mark.parametrize("name", FP4_FORMATS)
@pytest.mark.parametrize(
    "arch, dtype", [("sm_80", HALF[0]), ("sm_80", HALF[1]), ("sm_100", HALF[1])]
)
def test_many_rows_are_the_reference_bit_for_bit(arch: str, dtype: torch.dtype, name: str) -> None:
    packed = fp4graph.quantize(torch.randn(70, 200) * torch.logspace(-2, 2, 200), name)
    x, bias = torch.randn(257, 200).to(dtype), torch.randn(70).to(dtype)
    y = run(x, packed, arch, None, bias, run=stand_in(TARGETS[arch]))
    assert torch.equal(y, linear(x, packed.dequantize(dtype), bias))
    order = layout.order_of(dtype, TARGETS[arch])
    packed = every_code_and_scale(name)
    dense = launch.dequantize(
        *layout.pack(packed, order), 512, dtype, order, packed.format.block_size, run=interpret
    )
    assert torch.equal(dense, packed.dequantize(dtype))


@pytest.mark.parametrize("name", FP4_FORMATS)
def test_nan_scales_make_their_row_nan_and_spread_no_further(name: str) -> None:
    packed = fp4graph.quantize(torch.randn(20, 96), name)
    packed.scale.view(torch.uint8)[3, 1] = 0x7F if name == "nvfp4" else 0xFF
    y = run(torch.randn(4, 96).bfloat16(), packed, "sm_90", None)
    assert y[:, 3].isnan().all()
    assert y[:, [0, 1, 2, *range(4, 20)]].isfinite().all()


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_groups_far_below_their_row_count_as_nothing(arch: str, dtype: torch.dtype) -> None:
    bits = torch.full((2, 4), 127, dtype=torch.uint8)
    bits[0] = torch.tensor([254, 127, 20, 0])
    scale = bits.view(fp4graph.MXFP4.scale_codec.dtype)
    qdata = torch.full((2, 64), 0x22, dtype=torch.uint8)
    packed = fp4graph.PackedWeight(qdata, scale, None, (2, 128), fp4graph.MXFP4)
    order = layout.order_of(dtype, TARGETS[arch])
    _, factor = layout.unpack(*layout.pack(packed, order), (2, 128), 32, order)
    y = run(torch.eye(128, dtype=dtype)[[0, 32, 64, 96]], packed, arch, PLAIN)
    assert torch.equal(y[:, 1], torch.ones(4))
    assert y[0, 0] == 2.0**127
    reach = 2.0 ** (127 - order.e8m0_range)
    assert torch.equal(
        y[1:, 0],
        torch.tensor([each if each >= reach else 0.0 for each in (1.0, 2.0**-107, 2.0**-127)]),
    )
    assert factor[1].tolist() == [1.0] * 4


def test_views_and_strides() -> None:
    packed = fp4graph.quantize(torch.randn(8, 128))
    dense = packed.dequantize(torch.float64)
    base = torch.randn(1 + 6 * 128).bfloat16()
    for x in (base[1:].view(6, 128), base[:-1].view(128, 6).T, base[:128], base[:0].view(0, 128)):
        y = run(x, packed, "sm_90", None)
        assert y.shape == (*x.shape[:-1], 8)
        assert y.numel() == 0 or relative_l2(y, linear(x.double(), dense)) < 1e-6


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 32, 33, 128])
@pytest.mark.parametrize("n, k", [(1, 1), (896, 896), (128, 896), (4864, 896), (14336, 4096)])
@pytest.mark.parametrize("arch, count", [("sm_80", 108), ("sm_100", 148)])
def test_cuts_fit_the_problem(m: int, n: int, k: int, arch: str, count: int) -> None:
    cut = choose(m, n, k, Target("cuda", arch, count))
    assert 8 * cut.tokens >= min(m, 32)
    assert cut.wn * cut.wk in (2, 4)
    assert -(-k // 128) % cut.wk == 0
    assert cut.split * cut.wk <= max(1, -(-k // 128))
    assert cut.ring == 0 or cut.tiles == 4
