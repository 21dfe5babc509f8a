"""The kernels without torch: under sanitizers, and on other processors under an emulator."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from fp4graph.kernels.cpu.build import compile_program, find_compiler

CHECK = Path(__file__).parent / "native" / "check.cpp"
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


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


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"),
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_under_an_emulator(tmp_path: Path) -> None:
    compile_program(CHECK, tmp_path / "check", "aarch64-linux-gnu-g++", "aarch64", "-static")
    said = run("qemu-aarch64", str(tmp_path / "check"))
    assert said.endswith(" passed, 0 failed\n")
    assert "neon" in said
