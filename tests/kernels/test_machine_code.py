"""The offline gate: what shipped Triton launches compile to must not get worse than the table."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from typing import TYPE_CHECKING

import triton
from kernels import known_failures
from kernels.machine_code import TABLE, TARGETS, table_of
from triton.backends.nvidia.compiler import get_ptxas

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.proof("triton")

SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160}
MOST_REGISTERS = {"cuda": 255, "hip": 512}
DECODE_PER_WEIGHT = 2.2
DECODE_CONVERTED = 1.6  # float16 where the hardware converts
WGMMA_PER_WEIGHT = 2.9  # 4 are hidden behind 64 rows of x
SLACK = 1.02


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_worse_than_the_table(target: str) -> None:
    expected = json.loads(TABLE.read_text())[target]
    found = table_of(target)
    assert set(found) == set(expected), "the shipped launches changed: make machine-code"
    backend, arch = target.split(":")
    for name, line in found.items():
        before = expected[name]
        assert line["spilled"] == 0, name
        assert line["registers"] <= MOST_REGISTERS[backend], name
        assert line["registers"] <= before["registers"] + 8, name
        assert line["shared"] <= SHARED[arch] << 10, name
        multiplies = name.startswith(("multiply", "gemm", "warpgroup"))
        assert (line["matrix"] > 0) == multiplies, name
        assert line.get("serialized", 0) == 0, name
        for key in ("per_weight", "x_bytes_per_weight_byte"):
            assert line.get(key, 0) <= before.get(key, 0) * SLACK, (name, key)
        if name.startswith("warpgroup"):
            assert line["per_weight"] <= WGMMA_PER_WEIGHT, name
        if name.startswith("multiply"):
            _check_decode(name, line, arch)


def _check_decode(name: str, line: dict[str, float], arch: str) -> None:
    tiles = 4 if "TILES=4" in name else 2
    assert line["weight_loads"] >= 2 * tiles, name
    if "TOKENS=1" in name or "TOKENS=2" in name:
        converted = " float16 " in name and arch in ("sm_100", "sm_120")
        limit = DECODE_CONVERTED if converted else DECODE_PER_WEIGHT
        assert line["per_weight"] <= limit, name


def test_the_table_holds_every_target() -> None:
    table = json.loads(TABLE.read_text())
    assert tuple(table) == TARGETS
    for target in TARGETS:
        kinds = {name.split()[0] for name in table[target]}
        assert {"gemm", "gemv", "reduce_parts"} <= kinds
        assert ({"multiply", "dequantize"} <= kinds) == target.startswith("cuda")


@pytest.mark.parametrize("dtype, known", [("f16", True), ("bf16", False)])
def test_what_ptxas_knows(tmp_path: Path, dtype: str, known: bool) -> None:
    """Once it converts E2M1 to bfloat16, bfloat16 can be decoded on sm_100 as float16 is."""
    source = tmp_path / "k.ptx"
    source.write_text(
        ".version 8.8\n.target sm_100a\n.address_size 64\n.visible .entry k() {\n"
        ".reg .b32 a; .reg .b8 b; .reg .b16 c;\nmov.b16 c, 0; cvt.u8.u16 b, c;\n"
        f"cvt.rn.{dtype}x2.e2m1x2 a, b;\nret;\n}}\n"
    )
    done = subprocess.run(
        [get_ptxas(100).path, "--gpu-name=sm_100a", str(source), "-o", str(tmp_path / "k")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == known, done.stderr


TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


@pytest.mark.parametrize("name, compiles", [("nvfp4", TRITON >= (3, 8)), ("mxfp4", True)])
def test_what_dot_scaled_compiles_to(name: str, compiles: bool) -> None:
    done = subprocess.run(
        [sys.executable, known_failures.__file__, "cuda:sm_90", name],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == compiles, done.stderr
    assert compiles or "PassManager::run failed" in done.stderr or done.returncode < 0
