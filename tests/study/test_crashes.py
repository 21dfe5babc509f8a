"""Whatever ends an ablation, the same command goes on, and what comes out is what would have."""

from __future__ import annotations

import contextlib
import random
import resource
import sqlite3
import time
from typing import TYPE_CHECKING

import pytest
from support.command import Command

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

TRIALS = 1 + 2 * 14
KILLS = 10


def start(folder: Path, out: Path, file_size: int = resource.RLIM_INFINITY) -> Command:
    """Begin an ablation whose files may not grow beyond so many bytes."""
    return Command(
        "ablate", str(folder), "--by", "role,block", "--format", "nvfp4,mxfp4", "--tokens", "128",
        "--seq-len", "32", "--json", "--out", str(out), file_size=file_size,
    )  # fmt: skip


def finish(command: Command) -> list[str]:
    """Wait for a run and return its rows."""
    code, out, errors = command.wait()
    assert code == 0, errors
    return out.splitlines()


def kept(out: Path) -> int:
    """Count the trials that are stored."""
    if not (out / "trials.sqlite").is_file():
        return 0
    with contextlib.closing(sqlite3.connect(out / "trials.sqlite")) as db:
        try:
            return int(db.execute("SELECT count(*) FROM trials").fetchone()[0])
        except sqlite3.OperationalError:  # killed before the table was made
            return 0


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    rows = finish(start(tiny_folder, tmp_path_factory.mktemp("undisturbed")))
    assert len(rows) == TRIALS
    return rows


@pytest.fixture(scope="module")
def seconds(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, undisturbed: list[str]
) -> float:
    """How long a run takes, once the first has started what processes are forked from."""
    begin = time.monotonic()
    assert finish(start(tiny_folder, tmp_path_factory.mktemp("timed"))) == undisturbed
    return time.monotonic() - begin


def test_kill_9_ten_times(
    tiny_folder: Path, tmp_path: Path, undisturbed: list[str], seconds: float
) -> None:
    moments = random.Random(0)
    before = killed = 0
    for number in range(KILLS):
        command = start(tiny_folder, tmp_path)
        if number % 2:  # somewhere in a trial, or while writing
            until = min(before + moments.randint(1, 4), TRIALS - 1)
            while kept(tmp_path) < until and command.running():
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.05))
        else:  # anywhere, loading included
            time.sleep(moments.uniform(0.05, 0.7) * seconds)
        killed += command.kill()
        assert kept(tmp_path) >= before, "what was kept is lost"
        before = kept(tmp_path)
    assert before > 0
    assert killed >= KILLS - 2
    assert finish(start(tiny_folder, tmp_path)) == undisturbed
    assert kept(tmp_path) == TRIALS
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"trials.sqlite", "ablation.jsonl", "ablation.png", "runs.jsonl"}


def test_two_at_once_on_one_store(
    tiny_folder: Path, tmp_path: Path, undisturbed: list[str]
) -> None:
    both = [start(tiny_folder, tmp_path) for _ in range(2)]
    assert [finish(command) for command in both] == [undisturbed] * 2
    assert kept(tmp_path) == TRIALS


def test_a_full_disk(tiny_folder: Path, tmp_path: Path, undisturbed: list[str]) -> None:
    code, out, errors = start(tiny_folder, tmp_path, file_size=170_000).wait()
    assert code == 2
    assert errors.splitlines()[-1].startswith("fp4graph: cannot read or write the results in")
    assert "Traceback" not in errors
    rows = out.splitlines()
    assert 0 < len(rows) < TRIALS
    assert rows == undisturbed[: len(rows)]
    assert kept(tmp_path) >= len(rows)
    assert finish(start(tiny_folder, tmp_path)) == undisturbed
