"""The interpreter's repairs: a new Triton that needs others, or none, is noticed here."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from kernels.triton_interpreter import interpret, twin  # noqa: E402

pytestmark = pytest.mark.proof("triton")

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@triton.jit
def _copy(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def _double(x):
    return x * 2


@triton.jit
def _arithmetic(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a * b)
    tl.store(out + N + at, a + b)
    tl.store(out + 2 * N + at, _double(a) - b)
    tl.store(out + 3 * N + at, tl.where(a > b, a, b))


@triton.jit
def _dot(x, y, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(x + m[:, None] * K + k[None, :])
    b = tl.load(y + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(a, b))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    interpret(_copy)[(1,)](x, y, N=x.numel())
    return y


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def test_every_bfloat16_becomes_its_float32() -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = torch.where(x.isnan(), 0, x)
    assert torch.equal(bits(cast(x, torch.float32)), bits(x.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_float32_is_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    x = torch.randn(65536, generator=torch.Generator().manual_seed(0)) * 8
    x[:4] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0, 2.0**-9])
    assert torch.equal(bits(cast(x, dtype)), bits(x.clamp(-448, 448).to(dtype)))


def test_every_float8_becomes_its_float32() -> None:
    x = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(cast(x, torch.float32).nan_to_num(7), x.float().nan_to_num(7))


@pytest.mark.parametrize("name", HALF)
def test_arithmetic_rounds_once(name: str) -> None:
    x, y = (
        torch.randn(1024, generator=torch.Generator().manual_seed(s)).to(HALF[name]) for s in (1, 2)
    )
    out = torch.empty(4, 1024, dtype=HALF[name])
    interpret(_arithmetic)[(1,)](x, y, out, N=1024)
    expected = (x * y, x + y, x * 2 - y, torch.maximum(x, y))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(out, expected, strict=True))


@pytest.mark.parametrize("name", HALF)
def test_dot(name: str) -> None:
    x, y = torch.randn(16, 64).to(HALF[name]), torch.randn(64, 32).to(HALF[name])
    out = torch.empty(16, 32)
    interpret(_dot)[(1,)](x, y, out, M=16, N=32, K=64)
    assert torch.allclose(out, x.float() @ y.float(), rtol=1e-5, atol=1e-5)


@triton.jit
def _assembly(x):
    return tl.inline_asm_elementwise("add.s32 $0, $1, 1;", "=r,r", [x], tl.int32, True, 1)


@triton.jit
def _reference(x):
    return x + 1


@triton.jit
def _uses_assembly(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, _assembly(tl.load(x + at)))


def test_a_twin_stands_in_for_assembly() -> None:
    twin(_assembly, _reference)
    x = torch.arange(16, dtype=torch.int32)
    y = torch.empty_like(x)
    interpret(_uses_assembly)[(1,)](x, y, N=16)
    assert torch.equal(y, x + 1)


def test_the_same_kernel_compiles_before_and_after() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for _ in range(2):
        signature = {"x": "*bf16", "y": "*fp32", "N": "constexpr"}
        source = ASTSource(_copy, signature, constexprs={(2,): 64})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert "ptx" in compiled.asm
        assert torch.equal(
            cast(torch.ones(64, dtype=torch.bfloat16), torch.float32), torch.ones(64)
        )
