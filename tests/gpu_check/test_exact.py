"""Exactness and seeded faults: this CPU's own kernels stand for a GPU's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.fake_device import FakeDevice
from torch.nn.functional import linear

import fp4graph
from fp4graph.formats import FP4_FORMATS
from fp4graph.gpu_check import exact
from fp4graph.gpu_check.exact import PROBLEMS, exactness, of_bound
from fp4graph.gpu_check.faults import ROWS, faults, spoil
from fp4graph.kernels.cpu import CPU

CPU_DEVICE = FakeDevice()


@pytest.fixture(scope="module")
def h100() -> FakeDevice:
    """Pass for an H100, whose compiled kernels run on numpy."""
    pytest.importorskip("triton")
    from kernels.on_cpu import run_triton_ops_on_cpu

    run_triton_ops_on_cpu()
    return FakeDevice(target="cuda:sm_90")


def test_forty_problems_with_all_kinds_of_rows() -> None:
    assert len(PROBLEMS) == len(set(PROBLEMS)) == 40
    for one, other in zip(PROBLEMS[::2], PROBLEMS[1::2], strict=True):  # of one weight, two dtypes
        assert one[:2] == other[:2]
    for low, high in [(1, 8), (9, 16), (17, 32 + 1), (34, 128), (129, 300)]:
        assert any(low <= rows <= high for *_, rows in PROBLEMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, k, rows", [(100, 300, 5), (192, 576, 33), (1, 64, 1), (64, 128, 257)])
def test_right_kernels_are_right(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    found = list(exactness(CPU_DEVICE, n, k, rows, dtype))
    assert {row.format for row in found} == set(FP4_FORMATS)
    assert {row.kernel for row in found} == {"cpu"}
    assert all(row.ok for row in found)
    if n * rows > 100:  # else all may be lucky
        assert all(row.of_bound > 0.05 for row in found)


@pytest.mark.parametrize("n, k, rows", [(64, 128, 1), (100, 300, 17), (64, 128, 129)])
def test_kernels_for_gpus_are_right(n: int, k: int, rows: int, h100: FakeDevice) -> None:
    found = list(exactness(h100, n, k, rows, torch.bfloat16))
    kernels = {"triton", "triton_fragments"}
    if n % 16 == k % 16 == 0:
        kernels.add("scaled_mm")  # FP8 by FP8, which torch has for CPUs too
    assert {row.kernel for row in found} == kernels
    assert {row.format for row in found if row.kernel == "scaled_mm"} <= {"fp8 W8A8"}
    assert all(row.ok for row in found)


@pytest.mark.parametrize("rows", [1, pytest.param(257, marks=pytest.mark.slow)])
def test_faults_in_the_layouts_for_gpus_are_found(rows: int, h100: FakeDevice) -> None:
    found = list(faults(h100, rows))
    assert {row.kernel for row in found} == {"triton", "triton_fragments"}
    assert all(row.found for row in found), [row for row in found if not row.found]


def test_a_wrong_element_shows() -> None:
    generator = torch.Generator().manual_seed(0)
    packed = fp4graph.quantize(torch.randn(64, 128, generator=generator), "nvfp4")
    x = torch.randn(4, 128, generator=generator).bfloat16()
    y = linear(x, packed.dequantize(torch.bfloat16))
    assert of_bound(y, x, packed, None) <= 1
    y[2, 7] += 0.2 * packed.dequantize().abs().max()
    assert of_bound(y, x, packed, None) > 1
    y[2, 7] = float("nan")
    assert of_bound(y, x, packed, None) == float("inf")


def test_a_kernel_that_is_not_the_same_twice_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def shaky(x: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
        calls.append(1)
        y = CPU.ops["nvfp4"](x, *tensors)
        y[0, 0] += len(calls) * torch.finfo(y.dtype).eps * y[0, 0].abs()
        return y

    kernel = replace(CPU, ops={"nvfp4": shaky})
    monkeypatch.setattr(exact, "KERNELS", (kernel,))
    (row,) = exactness(CPU_DEVICE, 64, 128, 5, torch.bfloat16)
    assert not row.repeats
    assert not row.ok


@pytest.mark.parametrize("rows", ROWS)
def test_every_seeded_fault_is_found(rows: int) -> None:
    found = list(faults(CPU_DEVICE, rows))
    assert {row.format for row in found} == set(FP4_FORMATS)
    assert {row.fault.partition(": ")[2] for row in found} == {
        "the halves of some bytes exchanged", "moved by a word", "two neighbouring words exchanged",
        "one scale half as large again",
    }  # fmt: skip
    assert all(row.found for row in found), [row for row in found if not row.found]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32], ids=str)
def test_faults_differ_from_what_they_spoil(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 65).to(dtype).view(8, 8)
    before = tensor.clone()
    spoilt = dict(spoil(tensor))
    assert len(spoilt) == (1 if dtype == torch.float32 else 3)
    for each in spoilt.values():
        assert each.shape == tensor.shape
        assert each.dtype == tensor.dtype
        assert not torch.equal(each, before)
    assert torch.equal(tensor, before)
