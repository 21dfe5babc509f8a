"""Where the native CPU kernels come from: compiled at first use, or not to be had."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING

import pytest

import fp4graph
from fp4graph import OptionError
from fp4graph.kernels.cpu.build import BuildError, compile_library

if TYPE_CHECKING:
    from pathlib import Path


def script(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


ONE_LINEAR = """
    import logging, torch, fp4graph
    logging.basicConfig(format="%(message)s")
    fp4graph.kernels.cpu.library._places.__globals__["__file__"] = "/nowhere/library.py"
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(64, 48)])})
    layer = model["layers"][0].requires_grad_(False)
    backend = fp4graph.backend("path:*", inner="eager")
    x = torch.randn(3, 64)
    y = torch.compile(layer, backend=backend)(x)
    w = fp4graph.NVFP4.quantize(layer.weight).dequantize()
    assert torch.allclose(y, torch.nn.functional.linear(x, w, layer.bias), atol=1e-5)
    (row,) = backend.report
    print(row.kernel, row.bytes_packed > row.bytes_dense, row.reason)
"""


@pytest.mark.slow
def test_without_a_compiler_it_dequantises_once_and_says_so(tmp_path: Path) -> None:
    done = script(ONE_LINEAR, CXX="", PATH="/nowhere", FP4GRAPH_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dequantized True")
    assert "saves no memory and no time; kernel cpu: no C++ compiler found" in done.stdout
    lines = [line for line in done.stderr.splitlines() if "no native CPU kernels" in line]
    assert len(lines) == 1
    assert "no C++ compiler found; install one" in lines[0]


@pytest.mark.slow
def test_with_a_cache_that_cannot_be_written_it_dequantises_once(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    done = script(ONE_LINEAR, FP4GRAPH_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dequantized True")


@pytest.mark.slow
def test_compiled_at_first_use_by_several_processes_at_once(tmp_path: Path) -> None:
    """What races is how the library is put in its place: a compiler that is done already serves."""
    native = fp4graph.kernels.cpu.load()
    assert isinstance(native, fp4graph.kernels.cpu.Native)
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/bash\n"
        'sleep 0.$RANDOM; out="${@: -1}"\n'
        f'case "$*" in *-shared*) cp {native.path} "$out";; *) touch "$out";; esac\n'
    )
    compiler.chmod(0o755)
    results: list[subprocess.CompletedProcess[str]] = []
    workers = [
        threading.Thread(
            target=lambda: results.append(
                script(ONE_LINEAR, FP4GRAPH_CACHE=str(tmp_path), CXX=str(compiler))
            )
        )
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [done.stdout.split()[0] for done in results] == ["cpu", "cpu"], results[0].stderr
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]


@pytest.mark.slow
def test_an_instruction_set_that_is_not_there() -> None:
    done = script("import fp4graph; fp4graph.kernels.cpu.load()", FP4GRAPH_CPU_ISA="sse9")
    assert "OptionError: FP4GRAPH_CPU_ISA=sse9: this machine has" in done.stderr
    with pytest.raises(OptionError, match="portable"):
        fp4graph.kernels.cpu.load().use("sse9")


@pytest.mark.slow
def test_no_native_kernel_on_request() -> None:
    done = script(ONE_LINEAR, FP4GRAPH_CPU_ISA="none")
    assert done.stdout.startswith("dequantized True"), done.stderr


def test_a_failed_build_names_the_error_among_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    said = "for i in $(seq 99); do echo a.h:$i: warning: odd >&2; done; echo a.h: error: bad >&2"
    compiler.write_text(f"#!/bin/sh\n{said}; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match=r"compiler failed: a\.h: error: bad$"):
        compile_library(tmp_path / "library.so")
    assert not (tmp_path / "library.so").exists()
