"""The native CPU kernels, every instruction set that this machine runs."""

from __future__ import annotations

import math
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from support.closer import relative_l2
from torch.nn.functional import linear

import fp4graph
from fp4graph.errors import WeightError
from fp4graph.formats import FORMATS, FP4_FORMATS, FP8, ROTATIONS, rotate
from fp4graph.kernels import FAKE_QUANTIZE, ROTATE, Problem, Target
from fp4graph.kernels.cpu import CPU, Native, load, pack_tiles, unpack_tiles
from fp4graph.quantizers import quantize

if TYPE_CHECKING:
    from collections.abc import Iterator

ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx", "neon")
MANY = 800  # outputs for which float32 activations are multiplied in tiles, too
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ["nvfp4", "mxfp4", "mxfp4:ceil", "mxfp4:rceil", "mxfp4:even"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native = load()
    if not isinstance(native, Native):
        pytest.skip(native.reason)
    if request.param not in native.isas:
        pytest.skip(f"this machine runs {', '.join(native.isas)}")
    native.use(request.param)
    yield request.param
    native.use(None)


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    if n and k:
        w[:, k // 2] *= 50  # an outlier channel
    return w


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    if math.prod(shape):
        x[..., shape[-1] // 3] *= 50
    return x.to(dtype)


def run(
    x: torch.Tensor,
    packed: fp4graph.PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    int8: bool = False,
) -> torch.Tensor:
    ops = CPU.int8_ops if int8 else CPU.ops
    return ops[packed.format.base](x, *pack_tiles(packed), bias)


def exact(
    x: torch.Tensor, packed: fp4graph.PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    b = None if bias is None else bias.double()
    return linear(x.double(), packed.dequantize(torch.float64), b)


def check(y: torch.Tensor, reference: torch.Tensor) -> None:
    """Hold a result to the float64 one: rounded once to its dtype, and float32's error besides."""
    assert relative_l2(y, reference) <= 1.02 * relative_l2(reference.to(y.dtype), reference) + 5e-7


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 25, 49, 150])
@pytest.mark.parametrize("n, k", [(1, 1), (16, 32), (17, 100), (50, 777), (33, 4113), (MANY, 300)])
def test_exact_in_every_loop(
    isa: str, name: str, dtype: torch.dtype, m: int, n: int, k: int
) -> None:
    packed, x = fp4graph.quantize(weight(n, k), name), activations(m, k, dtype=dtype)
    bias = torch.randn(n).to(dtype) if m % 2 else None
    y = run(x, packed, bias)
    assert (y.dtype, y.shape) == (dtype, (m, n))
    if m:
        check(y, exact(x, packed, bias))


@pytest.mark.parametrize("name", FP4_FORMATS)
@pytest.mark.parametrize("m", [0, 1, 3, 4, 9, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_activations_stay_within_what_the_report_says(
    isa: str, name: str, m: int, dtype: torch.dtype
) -> None:
    packed, x = fp4graph.quantize(weight(50, 777), name), activations(m, 777, dtype=dtype)
    y = run(x, packed, int8=True)
    assert y.shape == (m, 50)
    if m:
        error = relative_l2(y, exact(x, packed))
        assert error < fp4graph.scheme.INT8_ERROR
        assert error > 1e-4 or (isa == "amx" and m == 33)  # which tiles multiply exactly


@pytest.mark.parametrize("name", FP4_FORMATS)
@pytest.mark.parametrize("n, k", [(0, 16), (1, 1), (15, 31), (64, 256), (33, 1000)])
def test_tiles_are_a_permutation_of_the_packed_weight(isa: str, name: str, n: int, k: int) -> None:
    packed = fp4graph.NVFP4 if name == "nvfp4" else fp4graph.MXFP4
    whole = packed.quantize(weight(n, k))
    qdata, scale = unpack_tiles(pack_tiles(whole)[0], (n, k), whole.format)
    assert torch.equal(qdata, whole.qdata)
    assert torch.equal(scale, whole.scale.view(torch.uint8))


@pytest.mark.parametrize("n, k", [(0, 16), (1, 1), (15, 31), (64, 256), (33, 1000)])
def test_fp8_tiles_are_a_permutation_of_the_packed_weight(isa: str, n: int, k: int) -> None:
    packed = FP8.quantize(weight(n, k))
    problem = Problem(n, k, FP8, torch.float32, Target("cpu"))
    assert CPU.unpack is not None
    back = CPU.unpack(CPU.prepack(packed, problem), problem, None)
    assert torch.equal(back.qdata, packed.qdata)
    assert torch.equal(back.scale, packed.scale)


@pytest.mark.parametrize("m", [1, 3, 20])
def test_every_code_of_fp8(isa: str, m: int) -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    qdata = torch.stack([codes.roll(shift) for shift in range(40)])
    scale = torch.logspace(-30, 30, 40)[:, None]
    packed = fp4graph.PackedWeight(qdata, scale, None, (40, len(codes)), FP8)
    for dtype in (torch.float32, torch.bfloat16):
        x = activations(m, len(codes), dtype=dtype)
        y, expected = run(x, packed).double(), exact(x, packed)
        size = linear(x.abs().double(), packed.dequantize(torch.float64).abs())
        assert ((y - expected).abs() <= (2e-6 if dtype == torch.float32 else 2**-8) * size).all()
    one = torch.eye(len(codes))
    assert torch.equal(run(one, packed).T, packed.dequantize())
    broken = qdata.clone()
    broken[3, 5] = 0xFF
    packed = fp4graph.PackedWeight(broken, scale, None, (40, len(codes)), FP8)
    with pytest.raises(WeightError, match="FP8 weight are NaN"):
        pack_tiles(packed)


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")
def test_a_packed_weight_asks_for_huge_pages() -> None:
    tiles, _ = pack_tiles(fp4graph.NVFP4.quantize(torch.ones(16, 1 << 20)))
    inside = tiles.data_ptr() + tiles.nbytes // 2
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if re.fullmatch("[0-9a-f]+-[0-9a-f]+", first):
            begin, end = (int(address, 16) for address in first.split("-"))
        elif first == "VmFlags:" and begin <= inside < end:
            assert "hg" in rest.split()
            return
    pytest.fail("the tiles lie nowhere")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1e-30, 1e-3, 1.0, 1e4])
def test_rounding_is_the_references_bit_for_bit(
    isa: str, name: str, dtype: torch.dtype, spread: float
) -> None:
    fmt = fp4graph.get_format(name)
    w = (weight(67, 333) * spread).to(dtype)
    w[3] = 0
    w[w.isinf()] = 1
    ours, theirs = quantize(w, fmt), fmt.quantize(w)
    assert torch.equal(ours.qdata, theirs.qdata)
    assert torch.equal(ours.scale.view(torch.uint8), theirs.scale.view(torch.uint8))
    assert ours.per_tensor_scale == theirs.per_tensor_scale
    w[5, 7], w[6, 40] = torch.nan, -torch.inf
    for x in (w, w[:, :1], w[:0], w.t()):
        assert torch.equal(FAKE_QUANTIZE(x, name).nan_to_num(7), fmt.fake_quantize(x).nan_to_num(7))
    with pytest.raises(fp4graph.WeightError, match="2 of 22311 values are NaN or Inf"):
        quantize(w, fmt)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("block", ROTATIONS)
def test_rotating_is_the_references_bit_for_bit(isa: str, block: int, dtype: torch.dtype) -> None:
    x = weight(67, 3 * block).to(dtype)
    x[5, 7] = torch.nan
    for each in (x, x[:1], x[:0], x.reshape(3, block, 67).movedim(1, 2)):
        assert torch.equal(ROTATE(each, block).nan_to_num(7), rotate(each, block).nan_to_num(7))
        for name in NAMES:
            expected = fp4graph.get_format(name).fake_quantize(rotate(each, block))
            assert torch.equal(
                FAKE_QUANTIZE(each, name, block).nan_to_num(7), expected.nan_to_num(7)
            )
    with pytest.raises(RuntimeError, match="no rotation of 48"):
        ROTATE(x, 48)


@pytest.mark.parametrize("name", FP4_FORMATS)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_every_scale_code(isa: str, name: str, m: int) -> None:
    """E8M0 from 0 to 254 and E4M3 with its subnormals; NaN codes make their row NaN."""
    fmt = fp4graph.get_format(name)
    codes = torch.arange(0x7F if name == "nvfp4" else 0xFF, dtype=torch.uint8).repeat(7)
    n = len(codes)
    qdata = torch.randint(256, (n, fmt.block_size // 2), dtype=torch.uint8)
    pts = torch.tensor(0.013) if name == "nvfp4" else None

    def packed(codes: torch.Tensor) -> fp4graph.PackedWeight:
        scale = codes[:, None].view(fmt.scale_codec.dtype)
        return fp4graph.PackedWeight(qdata, scale, pts, (n, fmt.block_size), fmt)

    x = activations(m, fmt.block_size) / 64
    y, expected = run(x, packed(codes)).double(), exact(x, packed(codes))
    size = linear(x.abs().double(), packed(codes).dequantize(torch.float64).abs())
    fits = size.amax(0) < 1e38
    assert fits.sum() > 100
    assert ((y - expected).abs() <= 1e-6 * size + 1e-43)[:, fits].all()
    broken = codes.clone()
    broken[5] = 0x7F if name == "nvfp4" else 0xFF
    y = run(x, packed(broken))
    assert y[:, 5].isnan().all()
    assert not y[:, :5].isnan().any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 4, 30])
def test_activations_at_the_ends_of_their_range(
    isa: str, name: str, dtype: torch.dtype, m: int
) -> None:
    packed = fp4graph.quantize(weight(MANY, 96) / 300, name)
    x = activations(m, 96)
    inputs = [
        x.sign() * torch.finfo(dtype).max / 4,
        x.sign() * torch.finfo(dtype).smallest_normal * 4,
    ]
    if dtype != torch.float16:
        inputs += [x * 2.0**-e for e in (30, 60, 85, 100)]
    compared = 0
    for x in (each.to(dtype) for each in inputs):
        expected = exact(x, packed)
        if expected.abs().max() > torch.finfo(dtype).smallest_normal * 100:
            check(run(x, packed), expected)
            compared += 1
    assert compared >= len(inputs) - 1  # but for the least, whose results are subnormal
    x = activations(m, 96, dtype=dtype)
    x[0, 3] = torch.nan
    assert run(x, packed)[0].isnan().all()
    x[0, 3] = torch.inf
    assert not run(x, packed)[0].isfinite().any()
    assert run(x, packed)[1:].isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("m", [1, 8, 30])
def test_small_activations_beside_a_large_one_that_counts_nothing(
    isa: str, name: str, m: int
) -> None:
    w = weight(MANY, 96)
    w[:, 0] = 0
    x = torch.randn(m, 96) * 2.0**-112
    x[:, 0] = 2.0**-88
    packed = fp4graph.quantize(w, name)
    check(run(x, packed), exact(x, packed))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("large, small", [(3e4, 1.0), (1.0, 2.0**-110)])
@pytest.mark.parametrize("columns", [range(1, 8), range(1, 2048, 2)], ids=["few", "many"])
def test_one_row_with_activations_of_all_sizes(
    isa: str, name: str, dtype: torch.dtype, large: float, small: float, columns: range
) -> None:
    if torch.tensor(small).to(dtype) == 0:
        pytest.skip(f"{dtype} has no {small}")
    w, x = weight(50, 2048), torch.full((1, 2048), large)
    w[:, : columns.stop] = 0
    w[:, columns] = weight(50, len(columns))
    w[:, columns.stop :] = 0
    x[:, columns] = small * torch.randn(len(columns), generator=torch.Generator().manual_seed(2))
    packed, x = fp4graph.quantize(w, name), x.to(dtype)
    check(run(x, packed), exact(x, packed))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_are_taken_at_a_time(isa: str, name: str, dtype: torch.dtype) -> None:
    packed, x = fp4graph.quantize(weight(MANY, 48), name), activations(4100, 48, dtype=dtype)
    y = run(x, packed)
    check(y, exact(x, packed))
    x[2048] = torch.nan
    assert run(x, packed).isnan().any(1).nonzero().tolist() == [[2048]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_alignment_and_dimensions(isa: str, dtype: torch.dtype) -> None:
    packed = fp4graph.quantize(weight(24, 96))
    wide = activations(4, 3, 200, dtype=dtype)
    for x in (wide[..., 1:97], wide[:, :, ::2][..., :96], wide.flatten()[3:99], wide[0, 0, 5:101]):
        check(run(x, packed), exact(x, packed))
    bias = torch.randn(48).to(dtype)[::2]
    x = wide[..., :96]
    check(run(x, packed, bias), exact(x, packed, bias))


def test_what_does_not_fit_is_refused(isa: str) -> None:
    packed = fp4graph.quantize(weight(24, 96))
    for x, bias in (
        (torch.randn(2, 80), None),
        (torch.randn(2, 96), torch.randn(23)),
        (torch.randn(2, 96), torch.randn(24).bfloat16()),
        (torch.ones(2, 96, dtype=torch.int32), None),
        (torch.tensor(1.0), None),
    ):
        with pytest.raises(RuntimeError):
            run(x, packed, bias)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_of_torch_and_of_python(isa: str, threads: int) -> None:
    before = torch.get_num_threads()
    packed = fp4graph.quantize(weight(1000, 1024))
    tiles = pack_tiles(packed)
    inputs = [activations(m, 1024) * m for m in (1, 2, 6, 64)]
    expected = [exact(x, packed) for x in inputs]
    torch.set_num_threads(threads)
    errors: list[float] = []

    def work() -> None:
        for x, want in zip(inputs, expected, strict=True):
            errors.append(relative_l2(CPU.ops["nvfp4"](x, *tiles, None), want))

    try:
        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    assert len(errors) == 16
    assert max(errors) <= 5e-7
