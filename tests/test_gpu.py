"""The graph side of GPUs, on a machine that has none."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import fake_cuda
from support.models import tiny, tokens
from torch.utils.cpp_extension import include_paths

import fp4graph
from fp4graph import RefusalError
from fp4graph.kernels import Problem, Target, choose, parse_target
from fp4graph.kernels.cpu.build import find_compiler

pytest.importorskip("triton")

DEVICES = ["cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "cuda:sm_120", "hip:gfx942", "hip:gfx950"]


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(fake_cuda.GUARD)
    includes = [f"-I{path}" for path in include_paths()]
    torch_lib = Path(torch.__file__).parent / "lib"
    subprocess.run(
        [find_compiler(), "-std=c++20", "-shared", "-fPIC", *includes, str(source),
         "-o", str(library), f"-L{torch_lib}", "-lc10"],
        check=True,
    )  # fmt: skip
    return library


@pytest.mark.slow
def test_qwen2_on_fake_cuda_reaches_generated_code(guard: Path) -> None:
    names = ("nvfp4", "mxfp4")
    done = subprocess.run(
        [sys.executable, fake_cuda.__file__, str(guard), *names],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, line in zip(names, done.stdout.splitlines()[-2:], strict=True):
        found = json.loads(line)
        blocks = [row for row in found["rows"] if row["block"] is not None]
        assert len(blocks) == 14
        assert {row["kernel"].partition("_")[0] for row in blocks} == {"triton"}
        assert all(row["layout"] and row["tile"] for row in blocks)
        assert sum(found["calls"].values()) == 14
        assert all(op.startswith("triton") and op.endswith(name) for op in found["calls"])


@pytest.mark.parametrize(
    "device", [DEVICES[0], *(pytest.param(each, marks=pytest.mark.slow) for each in DEVICES[1:])]
)
def test_explain_for_a_device_that_is_not_here(device: str) -> None:
    model = tiny("llama").bfloat16()
    report = fp4graph.explain(model, tokens(), select="all", device=device)
    chosen = [row for row in report if row.block is not None]
    assert chosen
    assert all(row.kernel and row.kernel.startswith("triton") for row in chosen)
    assert all(row.layout and "M=1" in (row.tile or "") for row in chosen)
    assert "layout" in json.loads(report.json_lines().splitlines()[0])


def test_what_no_fused_kernel_serves_says_so_in_its_row() -> None:
    report = fp4graph.explain(tiny("llama"), tokens(), select="q", device="cuda:sm_90")
    row = report.selected[0]
    assert row.kernel == "reference"
    assert "slower than dense" in row.reason
    assert "kernel triton: activations are torch.float32, and it takes bfloat16, float16" in (
        row.reason
    )
    assert "kernel cpu" not in row.reason


def test_unknown_device() -> None:
    with pytest.raises(fp4graph.OptionError, match=r"'cuda:sm_75'; known ones are cpu, cuda:sm_80"):
        parse_target("cuda:sm_75")
    assert parse_target("cuda:gfx950") == parse_target("hip:gfx950")


def test_reasons_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    format = fp4graph.NVFP4

    def problem(arch: str) -> Problem:
        return Problem(64, 64, format, torch.bfloat16, Target("cuda", arch, 40))

    with pytest.raises(RefusalError, match="it needs sm_80 or newer, and this is sm_75"):
        choose(problem("sm_75"), "triton")
    real = importlib.util.find_spec
    without = lambda name: None if name == "triton" else real(name)  # noqa: E731
    monkeypatch.setattr("fp4graph.kernels.triton.ops.find_spec", without)
    with pytest.raises(RefusalError, match=r"pip install 'fp4graph\[triton\]'"):
        choose(problem("sm_90"), "triton")
