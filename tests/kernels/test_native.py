"""The kernels without torch: under sanitizers, and for other processors under emulators."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fp4graph.kernels.cpu.build import (
    FLAGS,
    SOURCES,
    TORCH_ABI,
    WARNINGS,
    compile_program,
    find_compiler,
    torch_flags,
)

pytestmark = pytest.mark.proof("native")

CHECK = Path(__file__).parent / "native" / "check.cpp"
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *WARNINGS)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    compile_program(CHECK, tmp_path / "check", find_compiler(), platform.machine(), *SANITIZERS)
    said = run(str(tmp_path / "check"))
    assert said.endswith(" passed, 0 failed\n")
    assert "portable" in said


def test_the_ops_compile_without_warnings() -> None:
    include, _ = torch_flags()
    flags = (*FLAGS, *WARNINGS, *TORCH_ABI, *include, "-fsyntax-only")
    run(find_compiler(), *flags, str(SOURCES / "ops.cpp"))


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"),
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_under_an_emulator(tmp_path: Path) -> None:
    compile_program(
        CHECK, tmp_path / "check", "aarch64-linux-gnu-g++", "aarch64", "-static", *WARNINGS
    )
    said = run("qemu-aarch64", str(tmp_path / "check"))
    assert said.endswith(" passed, 0 failed\n")
    assert "neon" in said


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/usr/include/simde").is_dir(),
    reason="needs an x86-64 and Debian's libsimde-dev",
)
def test_avx512_in_portable_code(tmp_path: Path) -> None:
    """SIMDe and native/avx512/immintrin.h stand in for instructions that this CPU may not have."""
    emulated = (
        f"-I{CHECK.parent / 'avx512'}",
        "-DFP4_EMULATED=&fp4_avx512,&fp4_avx512bf16,&fp4_amx",
        '-DFP4_VECTOR_REGISTER="m"',
    )
    units = ("portable", "avx512", "avx512bf16", "amx")
    sources = [CHECK, *(SOURCES / f"{name}.cpp" for name in units)]

    def compile_unit(source: Path) -> str:
        out = str(tmp_path / f"{source.name}.o")
        flags = (*FLAGS, "-Og", "-w", *emulated, f"-I{SOURCES}")
        run(find_compiler(), *flags, "-c", str(source), "-o", out)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, sources))
    run(find_compiler(), *objects, "-pthread", "-o", str(tmp_path / "check"))
    said = run(str(tmp_path / "check"))
    assert said.endswith(" passed, 0 failed\n")
    assert "avx512bf16" in said
    assert "amx" in said
