"""Compiling the native kernels: at `pip install`, or at first use into a cache.

Imports nothing of fp4graph, and torch only for its headers: setup.py loads it by its path.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
INSTALL_COMPILER = (
    "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
    "macOS: xcode-select --install), or name it in CXX"
)

# -ffp-contract=off: codecs must round where the reference rounds. The last two only let loops be
# vectorised; neither changes a result.
FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# GCC's own headers of intrinsics make warnings of the kinds that are left out.
WARNINGS = (
    *("-Wall", "-Wextra", "-Werror"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi", "-Wno-restrict"),
)
"""For tests: a warning of a user's compiler is no error."""
TORCH_ABI = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)  # the stable ABI of torch 2.10
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_X86 = {
    "avx2.cpp": _AVX2,
    "avx512.cpp": _AVX512,
    "avx512bf16.cpp": (*_AVX512, "-mavx512bf16", "-mavx512vbmi"),
    "amx.cpp": (*_AVX512, "-mavx512bf16", "-mavx512vbmi", "-mamx-tile", "-mamx-bf16"),
}
_ISA_FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": _X86,
    "amd64": _X86,
    "aarch64": {"neon.cpp": ()},
    "arm64": {"neon.cpp": ()},
}


class BuildError(RuntimeError):
    """No compiler, or one that failed; the message says what to do."""


def library_name() -> str:
    """Return the library's file name, by a hash of sources and flags: no other is ever loaded."""
    digest = hashlib.sha256(repr((FLAGS, TORCH_ABI, _ISA_FLAGS)).encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return f"_native_{digest.hexdigest()[:16]}.so"


def find_compiler() -> str:
    """Return the C++ compiler: CXX, else g++, clang++ or c++.

    Raises:
        BuildError: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise BuildError(f"no C++ compiler found; {INSTALL_COMPILER}")


def compile_library(target: Path) -> None:
    """Compile the kernels and their ops into a shared library, in a minute.

    Args:
        target: the library; written whole or not at all.

    Raises:
        BuildError: no compiler, no torch, or a failure; the message has its first lines.
    """
    include, link = torch_flags()
    units = {SOURCES / "ops.cpp": (*TORCH_ABI, *include)}
    _compile(target, units, find_compiler(), platform.machine(), ("-shared", *link))


def compile_program(main: Path, target: Path, compiler: str, machine: str, *flags: str) -> None:
    """Compile the kernels without torch into a program, for tests: sanitizers, other processors.

    Args:
        main: the program's own source; it defines what native/parallel.h asks for.
        target: the program.
        compiler: a C++ compiler.
        machine: architecture that it targets.
        flags: for every unit and the linker.

    Raises:
        BuildError: the compiler failed.
    """
    _compile(target, {main: (f"-I{SOURCES}",)}, compiler, machine, ("-pthread",), flags)


def _compile(
    target: Path,
    units: dict[Path, tuple[str, ...]],
    compiler: str,
    machine: str,
    link: tuple[str, ...],
    extra: tuple[str, ...] = (),
) -> None:
    per_isa = _ISA_FLAGS.get(machine.lower(), {})
    for name, flags in {"api.cpp": (), "portable.cpp": (), **per_isa}.items():
        units[SOURCES / name] = flags
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def compile_unit(source: Path) -> str:
            out = str(Path(folder) / f"{source.name}.o")
            _run([compiler, *FLAGS, *extra, *units[source], "-c", str(source), "-o", out])
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        built = Path(folder) / target.name
        _run([compiler, *extra, *objects, *link, "-o", str(built)])
        built.replace(target)


def torch_flags() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what compiler and linker need for torch's stable ABI.

    Raises:
        BuildError: torch cannot be imported, as in pip's isolated build environment.
    """
    try:
        import torch
    except ImportError:
        raise BuildError(
            "torch is not visible here: pip install --no-build-isolation shows it to the build"
        ) from None
    root = Path(torch.__file__).parent
    return (f"-isystem{root / 'include'}",), (f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error}; {INSTALL_COMPILER}") from None
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if "error" in line]  # there are warnings besides
        said = " ".join(errors or lines)[:400] or f"exit status {done.returncode}"
        raise BuildError(f"{command[0]} failed: {said}")
