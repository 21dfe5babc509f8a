"""The Triton kernels on a real GPU, where there is one."""

from __future__ import annotations

import pytest
import torch
from support.closer import relative_l2
from torch.nn.functional import linear

import fp4graph
from fp4graph.formats import FORMATS
from fp4graph.kernels import Kernel, Problem, kernels, refusals, target_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")

EVERY = [kernel for kernel in kernels() if kernel.name.startswith("triton")]


@pytest.mark.parametrize("kernel", EVERY, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, k", [(100, 300), (896, 4864), (4096, 4096)])
def test_equals_float64(kernel: Kernel, name: str, dtype: torch.dtype, n: int, k: int) -> None:
    device = torch.device("cuda")
    problem = Problem(n, k, FORMATS[name], dtype, target_of(device))
    if refused := refusals(problem, [kernel]):
        pytest.skip(refused[0])
    generator = torch.Generator().manual_seed(n + k)
    packed = fp4graph.quantize(torch.randn(n, k, generator=generator).to(device), name)
    tensors = kernel.prepack(packed, problem)
    bias = torch.randn(n, generator=generator).to(device, dtype)
    for m in (1, 5, 16, 33, 64, 100, 257):
        x = torch.randn(m, k, generator=generator).to(device, dtype)
        y = kernel.ops[name](x, *tensors, bias)
        exact = linear(x.double(), packed.dequantize(torch.float64), bias.double())
        plain = relative_l2(linear(x, packed.dequantize(dtype), bias), exact)
        assert relative_l2(y, exact) <= 1.05 * plain
        assert torch.equal(y, kernel.ops[name](x, *tensors, bias))


@pytest.mark.parametrize("kernel", EVERY, ids=lambda kernel: kernel.name)
def test_runs_in_a_cuda_graph(kernel: Kernel) -> None:
    device = torch.device("cuda")
    problem = Problem(512, 512, FORMATS["nvfp4"], torch.bfloat16, target_of(device))
    if refused := refusals(problem, [kernel]):
        pytest.skip(refused[0])
    packed = fp4graph.quantize(torch.randn(512, 512, device=device))
    tensors = kernel.prepack(packed, problem)
    x = torch.randn(4, 512, device=device, dtype=torch.bfloat16)
    expected = kernel.ops["nvfp4"](x, *tensors, None)  # compiled outside of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.ops["nvfp4"](x, *tensors, None)
    graph.replay()
    assert torch.equal(y, expected)
