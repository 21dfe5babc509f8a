"""Every kernel on every format, dtype and odd shape means dequantise, then F.linear."""

from __future__ import annotations

import pytest
import torch
from kernels.on_cpu import STAND_IN, run_triton_ops_on_cpu
from support.closer import relative_l2
from torch.nn.functional import linear

import fp4graph
from fp4graph import OptionError, RefusalError
from fp4graph.formats import FORMATS
from fp4graph.kernels import FAKE_QUANTIZE, KERNELS, Kernel, Problem, Target, choose

SHAPES = [(1, 1, 1), (1, 16, 32), (3, 17, 33), (17, 64, 48), (128, 40, 80), (0, 8, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# for 16 bits a quarter of the spacing of values: the result rounded once, and little more
BOUNDS = {
    torch.float32: 5e-7,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 4,
    torch.float16: torch.finfo(torch.float16).eps / 4,
    torch.float64: 1e-12,
}
run_triton_ops_on_cpu()
EVERY = [
    pytest.param(kernel, name, id=f"{kernel.name}-{name}")
    for kernel in KERNELS
    for name in FORMATS
    if name in kernel.ops
]


def target(kernel: Kernel) -> Target:
    return Target("cpu") if kernel.serves(Target("cpu")) else STAND_IN


def problem(name: str, dtype: torch.dtype = torch.float32, n: int = 8, k: int = 16) -> Problem:
    return Problem(n, k, FORMATS[name], dtype, Target("cpu"))


def tensors(
    kernel: Kernel, packed: fp4graph.PackedWeight, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    asked = Problem(*packed.shape, packed.format, dtype, target(kernel))
    assert choose(asked, kernel.name) is kernel  # it refuses nothing that the contract asks
    return kernel.prepack(packed, asked)


def run(
    kernel: Kernel, packed: fp4graph.PackedWeight, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return kernel.ops[packed.format.base](x, *tensors(kernel, packed, x.dtype), bias)


@pytest.mark.parametrize("kernel, name", EVERY)
@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_as_close_to_float64_as_its_dtype_allows(
    kernel: Kernel, name: str, m: int, n: int, k: int, dtype: torch.dtype, with_bias: bool
) -> None:
    if dtype not in kernel.dtypes:
        pytest.skip(f"takes no {dtype}")
    generator = torch.Generator().manual_seed(m * 100 + n)
    w = torch.randn(n, k, generator=generator)
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if with_bias else None
    packed = fp4graph.quantize(w, name)
    y = run(kernel, packed, x, bias)
    assert y.dtype == dtype
    assert y.shape == (m, n)
    dense = packed.dequantize(torch.float64)
    exact = linear(x.double(), dense, None if bias is None else bias.double())
    if m:
        plain = relative_l2(linear(x, packed.dequantize(dtype), bias), exact)
        assert relative_l2(y, exact) <= max(1.05 * plain, BOUNDS[dtype])


@pytest.mark.parametrize("kernel, name", EVERY)
def test_exact_on_values_that_add_without_rounding(kernel: Kernel, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-2, 3, (24, 96), generator=generator).float()
    largest = 7.0 if name == "fp8" else 6.0  # so that scales are powers of two
    w[:, ::16] = largest
    w[0, 0] = largest
    packed = fp4graph.quantize(w * 448 if name == "nvfp4" else w, name)
    x = torch.randint(-4, 5, (2, 5, 96), generator=generator).to(kernel.dtypes[0])
    y = run(kernel, packed, x, None)
    assert torch.equal(y, linear(x.float(), packed.dequantize()).to(x.dtype))


@pytest.mark.parametrize("kernel, name", EVERY)
def test_takes_any_leading_dimensions_and_strides(kernel: Kernel, name: str) -> None:
    packed = fp4graph.quantize(torch.randn(8, 48), name)
    dtype = kernel.dtypes[0]
    x = torch.randn(48, 2, 3).permute(2, 1, 0).to(dtype)
    y = run(kernel, packed, x, None)
    assert y.shape == (3, 2, 8)
    exact = linear(x.double(), packed.dequantize(torch.float64))
    assert relative_l2(y, exact) < 2 * BOUNDS[dtype]  # the bound is what rounding does on average
    one = run(kernel, packed, x[0, 0], None)
    assert one.shape == (8,)
    assert relative_l2(one, y[0, 0]) < 2 * BOUNDS[dtype]


@pytest.mark.parametrize("kernel, name", EVERY)
def test_opcheck(kernel: Kernel, name: str) -> None:
    packed = fp4graph.quantize(torch.randn(8, 33), name)
    dtype = kernel.dtypes[0]
    for bias in (None, torch.randn(8, dtype=dtype)):
        args = (torch.randn(4, 33, dtype=dtype), *tensors(kernel, packed, dtype), bias)
        torch.library.opcheck(kernel.ops[name], args)


def test_opcheck_fake_quantize() -> None:
    for name in ("nvfp4", "mxfp4:even"):
        torch.library.opcheck(FAKE_QUANTIZE, (torch.randn(2, 3, 33), name))


@pytest.mark.parametrize("kernel, name", EVERY)
def test_non_finite_activations_come_through(kernel: Kernel, name: str) -> None:
    packed = fp4graph.quantize(torch.randn(8, 32), name)
    x = torch.randn(3, 32, dtype=kernel.dtypes[0])
    x[0, 4], x[1, 4] = torch.nan, torch.inf
    y = run(kernel, packed, x, None)
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()
    assert y[2].isfinite().all()


def test_refusal_says_why_and_names_the_kernel() -> None:
    with pytest.raises(
        RefusalError,
        match=r"kernel reference: activations are torch\.int8, and it takes float32, bfloat16, ",
    ):
        choose(problem("nvfp4", torch.int8))
    assert choose(problem("nvfp4")).name == KERNELS[0].name
    assert choose(problem("nvfp4"), "reference").name == "reference"


def test_unknown_kernel() -> None:
    with pytest.raises(OptionError, match="kernels are auto, cpu"):
        choose(problem("nvfp4"), "triton9")


def test_auto_falls_through_a_kernel_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    first = KERNELS[0]
    picky = Kernel("picky", first.ops, first.prepack, refuses=lambda p: "never on a Tuesday")
    monkeypatch.setattr("fp4graph.kernels.registry.KERNELS", (picky, *KERNELS))
    assert choose(problem("nvfp4")).name != "picky"
    with pytest.raises(RefusalError, match=r"kernel picky: never on a Tuesday$"):
        choose(problem("nvfp4"), "picky")
