"""The two formats: layout, scale rules, edges, and other people's tensors."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from support.closer import relative_l2
from torch import Tensor
from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

import fp4graph
from fp4graph import MXFP4, NVFP4, OptionError, WeightError
from fp4graph.formats.minifloat import E2M1

NAMES = ["nvfp4", "mxfp4", "mxfp4:ceil", "mxfp4:rceil", "mxfp4:even"]


def rand(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def laplace(*shape: int) -> Tensor:
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = uniform - 0.5
    return (-centred.sign() * torch.log1p(-2 * centred.abs())).float()


def slow_quantize_dequantize(w: Tensor, name: str) -> Tensor:
    """Quantise and dequantise in float64, value by value of the definition."""
    size = 16 if name == "nvfp4" else 32
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    out = torch.zeros_like(w, dtype=torch.float64)
    tensor_scale = float(w.abs().max() / 2688)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], size):
            group = w[row, start : start + size].double()
            amax = float(group.abs().max())
            if name == "nvfp4":
                block = torch.tensor(max(amax / 6 / tensor_scale, 2.0**-9)).clamp(max=448)
                scale = float(block.to(torch.float8_e4m3fn).float()) * tensor_scale
            else:
                scale = 2.0 ** slow_exponent(amax, name.partition(":")[2])
            distance = ((group.abs() / scale).clamp(max=6)[:, None] - values).abs()
            out[row, start : start + size] = group.sign() * values[distance.argmin(1)] * scale
    return out


def slow_exponent(amax: float, rule: str) -> int:
    match rule:
        case "ceil":
            return math.ceil(math.log2(amax)) - 2
        case "rceil":
            return math.ceil(math.log2(amax / 6))
        case "even":
            mantissa, exponent = math.frexp(amax)
            return math.floor(math.log2(math.ldexp(round(mantissa * 4) / 4, exponent))) - 2
        case _:
            return math.floor(math.log2(amax)) - 2


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_a_slow_float64_definition(name: str) -> None:
    w = rand(7, 96, scale=0.05)
    fast = fp4graph.quantize(w, name).dequantize(torch.float64)
    slow = slow_quantize_dequantize(w, name)
    assert float((fast - slow).abs().max()) <= 1e-6 * float(slow.abs().max())


def test_nvfp4_agrees_with_torchao_bit_for_bit() -> None:
    for seed, scale in enumerate((1.0, 0.02, 1e-4, 3e3)):
        w = rand(64, 256, scale=scale, seed=seed)
        theirs = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=per_tensor_amax_to_scale(w.abs().amax()))
        ours = fp4graph.quantize(w)
        assert torch.equal(ours.qdata, theirs.qdata.view(torch.uint8))
        assert torch.equal(ours.scale.view(torch.uint8), theirs.scale.view(torch.uint8))
        assert torch.equal(ours.per_tensor_scale, theirs.per_tensor_scale)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(ours.dequantize(dtype), theirs.dequantize(dtype))


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even"])
def test_mxfp4_agrees_with_torchao_bit_for_bit(rule: str) -> None:
    for seed, scale in enumerate((1.0, 0.02, 1e-20, 1e20)):
        w = rand(64, 256, scale=scale, seed=seed)
        w[0, :32] = 0
        w[1, 0] = 2.0**10
        mode = ScaleCalculationMode[rule.upper()]
        theirs = MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32, scaling_mode=mode)
        ours = fp4graph.quantize(w, f"mxfp4:{rule}")
        assert torch.equal(ours.scale.view(torch.uint8), theirs.scale.view(torch.uint8))
        assert torch.equal(ours.qdata, theirs.qdata.view(torch.uint8))
        assert torch.equal(ours.dequantize(), theirs.dequantize(torch.float32))


def every_code_and_scale(fmt: fp4graph.BlockFormat, scales: Tensor) -> fp4graph.PackedWeight:
    """Make a weight whose row i has block scale i and all sixteen codes."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(fmt.block_size // 16)
    qdata = (codes[0::2] | (codes[1::2] << 4)).expand(len(scales), -1).contiguous()
    dtype = fmt.scale_codec.dtype
    tensor_scale = torch.tensor(0.0123) if fmt.has_per_tensor_scale else None
    shape = (len(scales), fmt.block_size)
    return fp4graph.PackedWeight(qdata, scales[:, None].view(dtype), tensor_scale, shape, fmt)


def test_nvfp4_dequantises_every_code_and_scale_like_torchao_and_float64() -> None:
    scales = torch.arange(0x7F, dtype=torch.uint8)
    packed = every_code_and_scale(NVFP4, scales)
    theirs = NVFP4Tensor(
        packed.qdata, packed.scale, 16, torch.float32, per_tensor_scale=packed.per_tensor_scale
    )
    assert torch.equal(packed.dequantize(), theirs.dequantize(torch.float32))
    values = E2M1.decode(torch.arange(16, dtype=torch.uint8)).double()
    exact = (
        scales.view(torch.float8_e4m3fn).double()[:, None]
        * values
        * packed.per_tensor_scale.double()
    )
    assert torch.allclose(packed.dequantize().double(), exact, rtol=2**-23, atol=0)


def test_mxfp4_dequantises_every_code_and_scale_like_torchao_and_float64() -> None:
    packed = every_code_and_scale(MXFP4, torch.arange(255, dtype=torch.uint8))
    theirs = MXTensor(
        packed.qdata, packed.scale, torch.float4_e2m1fn_x2, 32, torch.float32, None, None, False
    )
    ours = packed.dequantize()
    values = E2M1.decode(torch.arange(32, dtype=torch.uint8) % 16).double()
    exact = values * 2.0 ** (torch.arange(255, dtype=torch.float64)[:, None] - 127)
    representable = exact.abs() <= torch.finfo(torch.float32).max
    assert torch.equal(ours.double()[representable], exact[representable])
    assert torch.equal(ours, theirs.dequantize(torch.float32))


@pytest.mark.parametrize("fmt, nan_code", [(NVFP4, 0x7F), (MXFP4, 0xFF)])
def test_a_nan_scale_makes_its_group_nan(fmt: fp4graph.BlockFormat, nan_code: int) -> None:
    packed = every_code_and_scale(fmt, torch.tensor([nan_code, 64], dtype=torch.uint8))
    out = packed.dequantize()
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_the_sign_of_an_nvfp4_scale_is_ignored() -> None:
    packed = every_code_and_scale(NVFP4, torch.tensor([0x38, 0xB8], dtype=torch.uint8))
    assert torch.equal(packed.dequantize()[0], packed.dequantize()[1])


def test_compressed_tensors_reads_our_nibbles() -> None:
    w = rand(8, 64)
    packed = fp4graph.quantize(w)
    codes = unpack_fp4_from_uint8(packed.qdata, 8, 64, dtype=torch.float32)
    factor = packed.scale.float() * packed.per_tensor_scale
    assert torch.equal((codes.view(8, 4, 16) * factor[..., None]).flatten(1), packed.dequantize())


def test_the_low_nibble_is_the_even_column() -> None:
    w = torch.zeros(1, 16)
    w[0, :4] = torch.tensor([6.0, -6.0, 1.0, 0.5])
    packed = fp4graph.quantize(w)
    assert packed.qdata[0, :2].tolist() == [0xF7, 0x12]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 15, 16, 17, 31, 33, 100])
def test_k_that_is_no_multiple_of_the_group_is_padded(name: str, k: int) -> None:
    w = rand(5, k)
    packed = fp4graph.quantize(w, name)
    size = packed.format.block_size
    groups = -(-k // size)
    assert packed.qdata.shape == (5, groups * size // 2)
    assert packed.scale.shape == (5, groups)
    assert packed.nbytes == packed.format.packed_bytes(5, k)
    padded = torch.nn.functional.pad(w, (0, groups * size - k))
    assert torch.equal(packed.dequantize(), fp4graph.quantize(padded, name).dequantize()[:, :k])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zero_weights_and_zero_groups_stay_zero(name: str, dtype: torch.dtype) -> None:
    assert torch.equal(
        fp4graph.quantize(torch.zeros(3, 64, dtype=dtype), name).dequantize(), torch.zeros(3, 64)
    )
    w = rand(3, 64).to(dtype)
    w[1] = 0
    out = fp4graph.dequantize(fp4graph.quantize(w, name), dtype)
    assert out.dtype == dtype
    assert not out[1].any()
    assert out[0].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e30, 5e37])
def test_extreme_magnitudes_stay_finite(name: str, scale: float) -> None:
    w = rand(4, 64).clamp(-3, 3) * scale
    out = fp4graph.quantize(w, name).dequantize()
    assert out.isfinite().all()
    if scale > 1e-35:
        assert relative_l2(out, w) < 0.25


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    w = rand(4, 64)
    w[2, 5] = bad
    with pytest.raises(WeightError, match="1 of 256 values are NaN or Inf"):
        fp4graph.quantize(w, name)


@pytest.mark.parametrize(
    "shape, dtype", [((4,), torch.float32), ((2, 4, 4), torch.float32), ((4, 4), torch.int8)]
)
def test_what_is_no_float_matrix_is_refused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(WeightError, match="expected a float matrix"):
        fp4graph.quantize(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("name", NAMES)
def test_fake_quantize_is_quantize_then_dequantize(name: str) -> None:
    fmt = fp4graph.get_format(name)
    x = rand(2, 3, 50)
    expected = fmt.quantize(x.reshape(6, 50)).dequantize().reshape(x.shape)
    assert torch.equal(fmt.fake_quantize(x), expected)
    half = x.to(torch.bfloat16)
    assert fmt.fake_quantize(half).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_fake_quantize_keeps_what_is_not_finite_in_its_group(name: str, bad: float) -> None:
    fmt = fp4graph.get_format(name)
    x = rand(2, 64)
    clean = x.clone()
    clean[0, : fmt.block_size] = 0
    x[0, 3] = bad
    out = fmt.fake_quantize(x)
    assert out[0, : fmt.block_size].isnan().all()
    rest = fmt.fake_quantize(clean).flatten()[fmt.block_size :]
    assert torch.equal(out.flatten()[fmt.block_size :], rest)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9, 1.0])
def test_finite_values_never_become_inf(name: str, dtype: torch.dtype, share: float) -> None:
    fmt = fp4graph.get_format(name)
    x = torch.full((2, 64), torch.finfo(dtype).max * share, dtype=dtype)
    x[1] *= -1
    assert fmt.fake_quantize(x).isfinite().all()
    if dtype.itemsize == 2:
        assert fmt.quantize(x).dequantize(dtype).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0, 0), (3, 0, 32), (2, 3, 0)])
def test_fake_quantize_takes_empty_tensors(name: str, shape: tuple[int, ...]) -> None:
    out = fp4graph.get_format(name).fake_quantize(torch.zeros(shape))
    assert out.shape == shape


def test_a_float64_weight_beyond_float32_is_refused_for_that_reason() -> None:
    w = rand(4, 64).double()
    w[0, 0] = 1e300
    with pytest.raises(WeightError, match="1 of 256 values are beyond the range of float32"):
        fp4graph.quantize(w)


@pytest.mark.slow
def test_first_use_under_a_fake_mode_leaves_nothing_behind() -> None:
    code = """
        import torch, fp4graph
        from torch._subclasses.fake_tensor import FakeTensorMode
        with FakeTensorMode():
            for fmt in (fp4graph.NVFP4, fp4graph.MXFP4):
                fake = fmt.fake_quantize(torch.randn(4, 64))
        w = torch.randn(4, 64)
        print(type(fake).__name__, float((fp4graph.quantize(w).dequantize() - w).norm() / w.norm()))
        with FakeTensorMode():
            fp4graph.NVFP4.fake_quantize(torch.randn(4, 64))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kind, error = done.stdout.split()
    assert kind == "FakeTensor"
    assert float(error) < 0.15


ANCHORS = {  # ../shared/reference/formats.md: relative MSE, weight-free
    ("laplace", "nvfp4"): 0.00859,
    ("laplace", "mxfp4"): 0.01589,
    ("laplace", "mxfp4:rceil"): 0.01755,
    ("laplace", "mxfp4:even"): 0.01530,
    ("normal", "nvfp4"): 0.00903,
    ("normal", "mxfp4"): 0.01321,
    ("normal", "mxfp4:rceil"): 0.01331,
    ("normal", "mxfp4:even"): 0.01251,
}


@pytest.mark.parametrize("distribution, name", ANCHORS)
def test_relative_mse_anchor(distribution: str, name: str) -> None:
    draw = {"laplace": laplace, "normal": rand}[distribution]
    x = draw(8000, 1024)
    error = (fp4graph.quantize(x, name).dequantize() - x).square().mean() / x.square().mean()
    assert float(error) == pytest.approx(ANCHORS[distribution, name], rel=0.011)


def test_format_names() -> None:
    assert fp4graph.get_format("mxfp4:floor") == MXFP4
    assert [fp4graph.get_format(name).name for name in NAMES] == NAMES
    assert fp4graph.get_format(NVFP4) is NVFP4
    for bad in ("fp4", "nvfp4:even", "mxfp4:", "mxfp4:up", "NVFP4"):
        with pytest.raises(OptionError, match="formats are nvfp4, mxfp4"):
            fp4graph.get_format(bad)
