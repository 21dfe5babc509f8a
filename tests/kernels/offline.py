"""Compile Triton launches for GPUs that are not here, and say what came of them.

compiled = compile_launch(kernel, args, constants, Target("cuda", "sm_90"))
facts(compiled, target, weights=...)
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp4graph.kernels.target import Target

_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.int16: "*i16", torch.uint8: "*u8",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")
_A_RECORDS = 8  # wgmma: four a half


def gpu_target(target: Target) -> GPUTarget:
    """Return Triton's name of a target."""
    if target.backend == "hip":
        return GPUTarget("hip", target.arch, 64)
    return GPUTarget("cuda", target.capability, 32)


def compile_launch(
    kernel: Any, args: Sequence[Any], keywords: dict[str, Any], target: Target
) -> Any:
    """Compile what `kernel[grid](*args, **keywords)` would run on a target.

    Numbers and addresses that 16 divides are told to be so, as a launch would.
    """
    names = list(kernel.arg_names)
    constants = {name: value for name, value in keywords.items() if name not in OPTIONS}
    signature = dict.fromkeys(names, "constexpr")
    divisible = {}
    for name, value in zip(names, args, strict=False):
        signature[name] = type_of(value)
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if not isinstance(value, TensorDescriptor) and number % 16 == 0:
            divisible[(names.index(name),)] = [["tt.divisibility", 16]]
    made = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = made(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=divisible,
    )
    options = {name: value for name, value in keywords.items() if name in OPTIONS}
    return triton.compile(source, target=gpu_target(target), options=options)


def type_of(value: Any) -> str:
    """Return an argument's type as a launch would tell it to the compiler."""
    if isinstance(value, TensorDescriptor):
        element = _POINTERS[value.base.dtype].removeprefix("*")
        return f"tensordesc<{element}{list(value.block_shape)},{value.layout!r}>"
    return _POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"


@dataclass(frozen=True)
class Launch:
    """A launch that was caught instead of run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    def compile(self, target: Target) -> Any:
        """See `compile_launch`."""
        return compile_launch(self.kernel, self.args, self.keywords, target)


class Catch:
    """For `run=`: keeps launches instead of launching."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, kernel: Any) -> Launcher:
        return Launcher(kernel, self.launches.append)


class Launcher:
    """What `run=` returns: indexed by a grid and called, it hands on the launch."""

    def __init__(self, kernel: Any, use: Callable[[Launch], None]) -> None:
        self._kernel, self._use = kernel, use

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **keywords: self._use(Launch(self._kernel, grid, args, keywords))


@dataclass(frozen=True)
class Facts:
    """What the machine code of a kernel needs and does.

    Attributes:
        registers: a thread's.
        spilled: bytes of registers that go through memory.
        shared: bytes of shared memory of a program.
        instructions: how often each mnemonic of PTX, or of AMD's assembly, appears.
        loop: instructions of the longest loop in machine code, with wgmma of the shortest that has
            a record's; of AMD's, without scalar ones, which have a unit of their own.
        lanes: threads that one instruction serves.
        serialized: what ptxas says of wgmma that waits for each other: an info, no warning.
    """

    registers: int
    spilled: int
    shared: int
    instructions: Counter[str]
    loop: int
    lanes: int = 32
    serialized: tuple[str, ...] = ()

    def per_weight(self, weights: int, warps: int) -> float:
        """Lane-instructions of the main loop for each of the weights that a round of it takes."""
        return self.loop * self.lanes * warps / weights

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression from their start."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def facts(compiled: Any, target: Target) -> Facts:
    """Read the machine code of a compiled kernel."""
    return _amd(compiled) if target.backend == "hip" else _nvidia(compiled, target.capability)


def _amd(compiled: Any) -> Facts:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

    spilled = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    names = re.findall(r"^\s+([vs]_\w+|buffer_\w+|global_\w+|ds_\w+)", text, re.M)
    loops = _loops(text, r"^(\.LBB\w+):", r"^\s+([a-rt-z]\w+.*)", r"^\s+s_c?branch\w* (\.LBB\w+)")
    loop = max(map(len, loops), default=0)
    return Facts(
        number("vgpr_count"), spilled, number("group_segment_fixed_size"), Counter(names), loop, 64
    )


def _nvidia(compiled: Any, capability: int) -> Facts:
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        source.write_text(ptx)
        binary.write_bytes(compiled.asm["cubin"])
        arch = sm_arch_from_capability(capability)
        said = _output(
            get_ptxas(capability).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={arch}",
            str(source), "-o", f"{folder}/out",
        )  # fmt: skip
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        sass = _output(str(tools / "nvdisasm"), "-c", str(binary))
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    names = re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]+)", ptx, re.M)
    names += re.findall(r"(?:mma\.sync|cvt)\.[\w.]+", ptx)
    loops = _loops(
        sass, r"^(\.L_x_\d+):", r"^\s+/\*[0-9a-f]+\*/\s+(.*?);", r".*\bBRA\b.*`\((\.L_x_\d+)\)"
    )
    if products := [loop for loop in loops if sum("HGMMA" in each for each in loop) >= _A_RECORDS]:
        loops = [min(products, key=len)]  # a wait for a barrier spins outside of it
    return Facts(
        registers=int(re.search(r"Used (\d+) registers", said)[1]),  # type: ignore[index]
        spilled=sum(map(int, spills.groups())),  # type: ignore[union-attr]
        shared=compiled.metadata.shared,
        instructions=Counter(names),
        loop=max(map(len, loops), default=0),
        serialized=tuple(re.findall(r".*C75\d\d.*", said)),
    )


def _loops(code: str, label: str, instruction: str, branch: str) -> list[list[str]]:
    """Return the instructions from a label to each branch back to it."""
    labels: dict[str, int] = {}
    all_of: list[str] = []
    found = []
    for line in code.splitlines():
        if here := re.match(label, line):
            labels[here[1]] = len(all_of)
            continue
        if one := re.match(instruction, line):
            all_of.append(one[1])
        back = re.match(branch, line)
        if back and back[1] in labels:
            found.append(all_of[labels[back[1]] :])
    return found


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
