"""Compile a Qwen2 on fake CUDA tensors up to Inductor's generated code, on a machine without a GPU.

    python fake_cuda.py GUARD.so FORMAT [INNER]

Run as a script, in a process of its own, for it makes torch believe in an H100. Prints one JSON
object: the report's rows, and how often each op of fp4graph is called in the generated code.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import warnings
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
import torch._inductor.config
import torch._inductor.scheduler
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen2Config, Qwen2ForCausalLM
from triton.backends.compiler import GPUTarget

import fp4graph
from fp4graph.formats import BlockFormat, PackedWeight
from fp4graph.packed import cache, packing
from fp4graph.passes import choose

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
"""  # slicing a fake CUDA tensor asks for a device guard, and a CPU build of torch has none
H100 = SimpleNamespace(
    name="NVIDIA H100", gcnArchName="", major=9, minor=0, warp_size=32, multi_processor_count=132,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block_optin=232448, L2_cache_size=50 << 20, total_memory=80 << 30,
)  # fmt: skip


class Generated(Exception):
    """The code that Inductor generated, instead of a run of it."""


class Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def pretend() -> None:
    constants = {
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_compute_capability": 90,
        "current_device": 0,
        "device_count": 1,
        "is_available": True,
        "is_bf16_supported": True,
        "_lazy_init": None,
    }
    for name, value in constants.items():
        for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
            if hasattr(owner, name) and (owner, name) != (torch.cuda, "is_available"):
                setattr(owner, name, staticmethod(lambda *_, value=value, **__: value))
    triton.runtime.driver.set_active(Driver())
    torch._inductor.scheduler.has_triton = lambda *_: True
    torch._inductor.config.joint_graph_constant_folding = False  # it computes on real tensors
    torch._inductor.config.force_disable_caches = True
    GraphLowering.compile_to_module = _stop


def _stop(lowering: GraphLowering) -> Any:
    raise Generated(lowering.codegen()[0].value)


def pack_nothing() -> None:
    """Fake weights hold no values: make the tensors that packing would."""

    def quantize(w: torch.Tensor, format: BlockFormat, _: str) -> PackedWeight:
        groups = -(-w.shape[1] // format.block_size)
        return PackedWeight(
            w.new_empty((w.shape[0], groups * format.block_size // 2), dtype=torch.uint8),
            w.new_empty((w.shape[0], groups), dtype=format.scale_codec.dtype),
            w.new_empty((), dtype=torch.float32) if format.has_per_tensor_scale else None,
            (w.shape[0], w.shape[1]),
            format,
        )

    choose.is_plain = lambda _: True
    packing.quantize = quantize
    cache.fingerprint = lambda _: 0


def main(guard: str, *formats: str) -> None:
    warnings.simplefilter("ignore")
    ctypes.CDLL(guard)
    pretend()
    pack_nothing()
    for format in formats:
        torch._dynamo.reset()
        compile_model(format)


def compile_model(format: str) -> None:
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=2, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=1000,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).eval().bfloat16()
    backend = fp4graph.backend("all", format=format)
    code = ""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cuda")
        ids = torch.zeros(1, 8, dtype=torch.int64, device="cuda")
        try:
            torch.compile(model, backend=backend)(ids, use_cache=False)
        except torch._inductor.exc.InductorError as error:
            if not isinstance(error.inner_exception, Generated):
                raise
            code = str(error.inner_exception)
    calls = Counter(re.findall(r"= torch\.ops\.fp4graph\.(\w+)\.default\(", code))
    print(json.dumps({"rows": [asdict(row) for row in backend.report], "calls": calls}))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
