"""activations="auto": which way an op takes, from how many rows on, and who says so."""

from __future__ import annotations

import json
import logging
import statistics
from typing import TYPE_CHECKING

import pytest
import torch
from support.models import tiny, tokens

import fp4graph
from fp4graph.formats import FP4_FORMATS
from fp4graph.kernels.cpu import CPU, crossings, native, pack_tiles
from fp4graph.kernels.cpu.crossings import ROWS, changes, settle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(native() is None, reason="no native kernels here")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP4GRAPH_CACHE", str(tmp_path))
    crossings.crossings.cache_clear()
    return tmp_path / "crossings"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let rounding gain from a number of rows on; returns a list that grows by a one each time."""

    def let(rows: int, *, quiet: bool = True) -> list[int]:
        calls: list[int] = []
        gains = [1.5 if each >= rows else 1.05 for each in ROWS]
        monkeypatch.setattr(crossings, "_measured", lambda *_: (calls.append(1), (gains, quiet))[1])
        return calls

    return let


@pytest.mark.parametrize(
    "gains, rows",
    [
        ([1.0] * 9, []),
        ([1.09] * 9, []),
        ([2.0] * 9, [1]),
        ([1.0, 1.05, 1.2] + [2.0] * 6, [4]),
        ([1.0, 1.2, 1.0] + [2.0] * 6, [8]),  # one among others is noise
        ([1.0, 1.2, 1.2, 1.2, 1.2, 0.8, 0.7, 0.7, 0.7], [2, 32]),
    ],
)
def test_where_one_way_turns_to_the_other(gains: list[float], rows: list[int]) -> None:
    assert changes(gains) == rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FP4_FORMATS)
def test_the_op_takes_the_way_that_is_settled(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = fp4graph.quantize(torch.randn(48, 160, generator=generator), name)
    tiles = pack_tiles(packed)
    merged = CPU.merged[CPU.auto_ops[name]]
    try:
        for rows in ([], [1], [4], [2, 8], [2, 4, 8]):
            settle(packed.format, dtype, rows)
            for count in (1, 2, 3, 4, 7, 8, 20):
                x = torch.randn(count, 160, generator=generator).to(dtype)
                ops = CPU.int8_ops if sum(each <= count for each in rows) % 2 else CPU.ops
                expected = ops[name](x, *tiles, None)
                assert torch.equal(CPU.auto_ops[name](x, *tiles, None), expected)
                several = merged(x, *([each, each] for each in tiles), [None, None])
                assert all(torch.equal(each, expected) for each in several)
    finally:
        settle(packed.format, dtype, [])


def test_a_model_and_its_rows(measured: Callable[..., list[int]]) -> None:
    calls = measured(8)
    model = tiny("llama")
    logits = {}
    for how in ("none", "int8", "auto"):
        torch._dynamo.reset()
        backend = fp4graph.backend("all", activations=how, inner="eager", model=model)
        with torch.no_grad():
            call = torch.compile(model, backend=backend, dynamic=False)
            logits[how] = [call(tokens(n), use_cache=False).logits for n in (4, 9)]
    rows = backend.report.selected
    assert all("activations exact, 8 bits from 8 rows on" in (row.tile or "") for row in rows)
    assert "W4A16/8, activations within 1.5%" in rows[0].reason
    for index, how in enumerate(("none", "int8")):
        assert torch.equal(logits["auto"][index], logits[how][index])
    assert not torch.equal(logits["none"][1], logits["int8"][1])
    assert calls == [1]


def test_measured_once_and_kept(cache: Path, measured: Callable[..., list[int]]) -> None:
    calls = measured(16)
    ways = fp4graph.NVFP4, torch.bfloat16, CPU.ops["nvfp4"], CPU.int8_ops["nvfp4"], pack_tiles
    for _ in range(2):
        crossings.crossings.cache_clear()  # another process
        assert crossings.crossings(*ways) == (16,)
    assert calls == [1]
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == {"nvfp4 torch.bfloat16": [16]}
    file.write_text("{")
    crossings.crossings.cache_clear()
    assert crossings.crossings(*ways) == (16,)
    assert calls == [1, 1]


def test_times_of_a_busy_machine_are_not_kept(
    cache: Path, measured: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    measured(16, quiet=False)
    with caplog.at_level(logging.WARNING, logger="fp4graph"):
        rows = crossings.crossings(
            fp4graph.MXFP4, torch.float32, CPU.ops["mxfp4"], CPU.int8_ops["mxfp4"], pack_tiles
        )
    assert rows == (16,)
    assert not cache.exists()
    assert "busy" in caplog.text


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kernel": "reference"}, "exact at any number of rows, for reference rounds none"),
        ({"format": "fp8"}, "exact at any number of rows, for cpu rounds none"),
    ],
)
def test_kernels_that_do_not_round_say_so(options: dict[str, str], words: str) -> None:
    model = tiny("llama")
    report = fp4graph.explain(model, tokens(), select="q", activations="auto", **options)
    assert words in report.selected[0].reason


@pytest.mark.slow
def test_what_is_faster_is_found_by_measuring() -> None:
    exact = CPU.ops["nvfp4"]

    def twice(*arguments: object) -> torch.Tensor:
        exact(*arguments)
        return exact(*arguments)

    gains, _ = crossings._measured(fp4graph.NVFP4, torch.float32, twice, exact, pack_tiles)
    assert len(gains) == len(ROWS)
    assert 1.4 < statistics.median(gains) < 2.8
    assert changes(gains)[:1] == [1]
    losses, _ = crossings._measured(fp4graph.NVFP4, torch.float32, exact, twice, pack_tiles)
    assert changes(losses) == []
