"""Whatever ends an ablation, the same command goes on, and what comes out is what would have."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    Run = subprocess.Popen[str]

pytestmark = pytest.mark.slow

TRIALS = 1 + 2 * 14
KILLS = 10


def start(folder: Path, out: Path, file_size: int = resource.RLIM_INFINITY) -> Run:
    """Begin an ablation whose files may not grow beyond so many bytes."""
    command = [
        sys.executable, "-m", "fp4graph.cli", "ablate", str(folder), "--by", "role,block",
        "--format", "nvfp4,mxfp4", "--tokens", "128", "--seq-len", "32", "--json",
        "--out", str(out),
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size)),
    )


def finish(process: Run) -> list[str]:
    """Wait for a run and return its rows."""
    out, errors = process.communicate()
    assert process.returncode == 0, errors
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


def test_kill_9_ten_times(tiny_folder: Path, tmp_path: Path, undisturbed: list[str]) -> None:
    moments = random.Random(0)
    before = 0
    for number in range(KILLS):
        process = start(tiny_folder, tmp_path)
        if number % 2:  # somewhere in a trial, or while writing
            until = min(before + moments.randint(1, 4), TRIALS - 1)
            while kept(tmp_path) < until and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.1))
        else:  # anywhere, starting included
            time.sleep(moments.uniform(0.2, 4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert kept(tmp_path) >= before, "what was kept is lost"
        before = kept(tmp_path)
    assert before > 0
    assert finish(start(tiny_folder, tmp_path)) == undisturbed
    assert kept(tmp_path) == TRIALS
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"trials.sqlite", "ablation.jsonl", "ablation.png", "run.json"}


def test_two_at_once_on_one_store(
    tiny_folder: Path, tmp_path: Path, undisturbed: list[str]
) -> None:
    both = [start(tiny_folder, tmp_path) for _ in range(2)]
    assert [finish(process) for process in both] == [undisturbed] * 2
    assert kept(tmp_path) == TRIALS


def test_a_full_disk(tiny_folder: Path, tmp_path: Path, undisturbed: list[str]) -> None:
    process = start(tiny_folder, tmp_path, file_size=170_000)
    out, errors = process.communicate()
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("fp4graph: cannot read or write the results in")
    assert "Traceback" not in errors
    rows = out.splitlines()
    assert 0 < len(rows) < TRIALS
    assert rows == undisturbed[: len(rows)]
    assert kept(tmp_path) >= len(rows)
    assert finish(start(tiny_folder, tmp_path)) == undisturbed
