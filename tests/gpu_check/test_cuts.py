"""The search for the best cut, with times by a table and products by the reference."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest
import torch
from support.fake_device import FakeDevice
from torch.nn.functional import linear

import fp4graph
from fp4graph.gpu_check import cuts
from fp4graph.gpu_check.exact import problem_of
from fp4graph.kernels import parse_target
from fp4graph.kernels.triton.mma import FRAGMENTS
from fp4graph.kernels.triton.mma.cut import Cut, Unpack, choose
from fp4graph.kernels.triton.mma.kept import cut_for, keep
from fp4graph.kernels.triton.mma.layout import COLUMNS
from fp4graph.kernels.triton.mma.wgmma.tile import Tile, tiles_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("triton")

H100 = "cuda:sm_90"
N, K = 256, 512


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP4GRAPH_CACHE", str(tmp_path))
    cut_for.cache_clear()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Callable[[object, Exception | float], None]:
    """Let every way give the right product, but for those that are told otherwise."""
    odd: dict[object, Exception | float] = {}

    def multiply(device: FakeDevice, x: torch.Tensor, way: object) -> Callable[..., torch.Tensor]:
        generator = torch.Generator().manual_seed(N + K)
        w = torch.randn(N, K, generator=generator) / K**0.5
        dense = fp4graph.quantize(w, cuts.FORMAT).dequantize(torch.bfloat16)

        def run(*_: torch.Tensor) -> torch.Tensor:
            what = odd.get(way, 1.0)
            if isinstance(what, Exception):
                raise what
            return linear(x, dense) * what

        return run

    monkeypatch.setattr(cuts, "_multiply", multiply)
    return odd.__setitem__


def best_of(*names: str) -> Callable[[str], float]:
    """Let the last of some cuts be the fastest, the one before it the second."""
    order = {name: 1e-5 / (number + 2) for number, name in enumerate(names)}
    return lambda name: order.get(name, 1e-5)


def path(start: Cut, length: int) -> list[Cut]:
    """Go from neighbour to neighbour."""
    found = [start]
    while len(found) <= length:
        found.append(next(cut for cut in cuts.neighbours(found[-1], K) if cut not in found))
    return found


def test_goes_from_neighbour_to_neighbour_to_the_fastest(
    products: Callable[[object, Exception | float], None],
) -> None:
    chosen, *way = path(choose(1, N, K, parse_target(H100)), 3)
    device = FakeDevice(best_of(*map(str, way)), H100)
    tuned = cuts.tune(device, N, K, 1)
    assert tuned.cut == way[-1]
    assert (tuned.chosen, tuned.best) == (str(chosen), str(way[-1]))
    assert tuned.gain == pytest.approx(4)
    assert device.timed[-1] == [str(chosen), str(way[-1])]
    assert not tuned.failed


def test_what_fails_or_is_wrong_is_not_taken(
    products: Callable[[object, Exception | float], None],
) -> None:
    chosen = choose(16, N, K, parse_target(H100))
    broken, wrong, good = cuts.neighbours(chosen, K)[:3]
    products(broken, RuntimeError("out of resource: shared memory"))
    products(wrong, 1.1)
    device = FakeDevice(best_of(str(good), str(wrong), str(broken)), H100)
    tuned = cuts.tune(device, N, K, 16)
    assert tuned.cut == good
    assert [each for each in tuned.failed if "out of resource: shared memory" in each]
    assert [each for each in tuned.failed if "times its bound" in each]
    assert str(broken) not in itertools.chain(*device.timed)


def test_nothing_faster_keeps_what_was_chosen(
    products: Callable[[object, Exception | float], None],
) -> None:
    tuned = cuts.tune(FakeDevice(target=H100), N, K, 64)
    assert tuned.cut is None
    assert tuned.best == tuned.chosen
    assert tuned.gain == 1
    h100 = parse_target(H100)
    neighbours = cuts.neighbours(choose(64, N, K, h100), K)
    assert tuned.tried == 1 + len(neighbours) + len(list(tiles_for(64, N, K, h100)))


@pytest.mark.parametrize("rows", [32, 64, 128, 256, 512])
def test_a_tile_of_wgmma_goes_before_cuts_and_unpacking(
    rows: int, products: Callable[[object, Exception | float], None]
) -> None:
    h100 = parse_target(H100)
    best = Tile(min(rows, 64), 1)
    tuned = cuts.tune(FakeDevice(best_of(str(best)), H100), N, K, rows)
    assert tuned.cut == best
    assert tuned.gain == pytest.approx(2)
    keep(rows, N, K, best, h100)
    assert cut_for(rows, N, K, h100) == best
    assert cut_for(rows + 257, N, K, h100) == choose(rows + 257, N, K, h100)
    if rows in (64, 256):  # of those that a report shows
        problem = problem_of(FakeDevice(target=H100), N, K, "nvfp4", torch.bfloat16)
        assert f"M={rows}: {best}" in FRAGMENTS.plan(problem).tile


def test_only_hopper_is_tuned_beyond_what_cuts_take() -> None:
    for target, rows, expected in (
        (H100, 512, True),
        (H100, 513, False),
        ("cuda:sm_80", 256, False),
        ("cuda:sm_80", 128, True),
    ):
        assert cuts.is_tuned(FakeDevice(target=target), N, K, rows) == expected, (target, rows)
    assert not cuts.is_tuned(FakeDevice(), N, K, 1)
    assert cut_for(600, N, K, parse_target(H100)) == Unpack()


@pytest.mark.parametrize("k", [64, 512, 3584, 14336])
@pytest.mark.parametrize("rows", [rows for rows in cuts.ROWS if rows <= 128])
@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_90", "cuda:sm_100"])
def test_neighbours_can_be_launched(k: int, rows: int, target: str) -> None:
    chosen = choose(rows, 4096, k, parse_target(target))
    records = -(-k // COLUMNS)
    found = cuts.neighbours(chosen, k)
    assert chosen not in found
    for cut in found:
        assert records % cut.wk == 0
        assert 1 <= cut.split <= 16
        assert cut.wk * cut.split <= records
        assert (cut.most_registers is not None) >= (cut.ring > 0)
        assert cut.tokens == chosen.tokens


def test_kept_cuts_go_before_arithmetic_on_their_target_alone() -> None:
    h100, a100 = parse_target(H100), parse_target("cuda:sm_80")
    cut = Cut(1, 4, 2, 2, 2, 4, 96)
    assert cut_for(1, 4096, 4096, h100) == choose(1, 4096, 4096, h100)
    keep(1, 4096, 4096, cut, h100)
    keep(16, 4096, 4096, Cut(2, 4, 2, 2, 2, 0), h100)
    keep(64, 4096, 4096, Cut(4, 4, 1, 1, 1, 0), h100)
    assert cut_for(1, 4096, 4096, h100) == cut
    assert cut_for(8, 4096, 4096, h100) == cut
    assert cut_for(9, 4096, 4096, h100) == Cut(2, 4, 2, 2, 2, 0)
    assert cut_for(33, 4096, 4096, h100) == Cut(4, 4, 1, 1, 1, 0)
    others = [(32, 4096, h100), (65, 4096, h100), (1, 1024, h100), (1, 4096, a100)]
    for rows, n, target in others:  # another number of programs, weight or target
        assert cut_for(rows, n, 4096, target) == choose(rows, n, 4096, target)


KEY = "8 rows, 4096x4096"


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", f'{{"{KEY}": 1}}', f'{{"{KEY}": {{"tokens": 1}}}}'),
        json.dumps({KEY: asdict(Cut(2, 4, 2, 2, 2, 0))}),  # of other rows
        json.dumps({KEY: asdict(Cut(1, 4, 1, 3, 2, 0))}),  # which would leave columns out
        json.dumps({KEY: asdict(Tile(96, 1))}),  # which is no kernel
    ],
)
def test_what_cannot_be_read_or_does_not_fit_does_not_count(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = parse_target(H100)
    keep(1, 4096, 4096, Cut(1, 4, 2, 2, 2, 0), target)
    (file,) = (tmp_path / "cuts").iterdir()
    assert list(json.loads(file.read_text())) == [KEY]
    file.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert cut_for(1, 4096, 4096, target) == choose(1, 4096, 4096, target)
    assert any("does not count" in line for line in caplog.messages)
