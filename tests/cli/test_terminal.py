"""Every command on terminals of 80 to 200 columns: numbers whole, nothing beyond the edge."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from io import StringIO
from typing import TYPE_CHECKING

import pytest

from fp4graph.cli import common, main
from fp4graph.study import Table, views
from fp4graph.study.tasks import TaskRow

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WIDTHS = (80, 100, 120, 200)
MIX = "all," + ",".join(f"!({role},blocks=1)" for role in ("q", "k", "v", "o", "gate", "up"))
TEXT = ("--tokens", "64", "--seq-len", "16")
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]\d+)?[%~]?")


class Terminal:
    """Runs commands with stdout on a terminal of a width.

    The tables of studies are drawn again for each width, so that what takes long runs once.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.shown: list[object] = []

    def collect(self, *arguments: str) -> None:
        """Run a command and keep what it prints as tables."""
        shown = self.shown

        class Keeping:
            def print(self, what: object, **options: object) -> None:
                shown.append((what, options))

        self.monkeypatch.setattr(common, "output", lambda **_: Keeping())
        for module in ("inspect", "doctor"):
            self.monkeypatch.setattr(f"fp4graph.cli.{module}.output", common.output)
        self.monkeypatch.setattr("sys.stdout", StringIO())
        with pytest.raises(SystemExit) as end:
            main(list(arguments), prog_name="fp4graph")
        assert not end.value.code
        self.monkeypatch.undo()

    def at(self, width: int) -> list[str]:
        """Return the lines that a terminal of a width gets."""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        parts: list[bytes] = []

        def read() -> None:
            while True:
                try:
                    parts.append(os.read(master, 65536))
                except OSError:
                    return

        reader = threading.Thread(target=read)
        reader.start()
        with open(slave, "w", encoding="utf-8") as stream:
            self.monkeypatch.delenv("COLUMNS", raising=False)
            self.monkeypatch.setattr("sys.stdout", stream)
            console = common.output(as_json=False)
            for what, options in self.shown:
                console.print(what, **options)  # type: ignore[arg-type]
            self.monkeypatch.undo()
        reader.join()
        os.close(master)
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(parts).decode())
        return text.replace("\r", "").split("\n")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(monkeypatch)


def study(folder: Path, out: Path) -> dict[str, Callable[[], tuple[str, ...]]]:
    """Return every command that prints a table, by its name."""
    model, results = str(folder), str(out)
    select = ("--select", MIX, "--select", "attn,blocks<1", "--format", "nvfp4,mxfp4")
    return {
        "inspect": lambda: ("inspect", model, "--select", MIX),
        "inspect --linears": lambda: ("inspect", model, "--linears"),
        "inspect --device": lambda: ("inspect", model, "--device", "cuda:sm_90"),
        "ablate": lambda: ("ablate", model, *select, *TEXT, "--out", results),
        "ablate --plan grid": lambda: ("ablate", model, "--plan", "grid", *TEXT, "--out", results),
        "show": lambda: ("show", results),
        "sensitivity": lambda: ("sensitivity", model, *TEXT, "--against", results),
        "policy": lambda: (
            "policy", model, "--bits", "6", *TEXT, "--verify", "1", "--verify-tokens", "64",
            "--store", results,
        ),
        "outliers": lambda: ("outliers", model, *TEXT, "--against", results),
        "additivity": lambda: ("additivity", model, results),
        "latency": lambda: (
            "latency", model, "--select", MIX, "--inner", "eager", "--prompt-tokens", "4",
            "--new-tokens", "3", "--rounds", "2", "--no-memory",
        ),
    }  # fmt: skip


def numbers(line: str) -> list[str]:
    return [word for word in line.split() if NUMBER.fullmatch(word)]


@pytest.mark.slow
def test_every_table_of_every_command(
    terminal: Terminal, tiny_folder: Path, tmp_path: Path
) -> None:
    for name, arguments in study(tiny_folder, tmp_path).items():
        terminal.shown.clear()
        terminal.collect(*arguments())
        wide = terminal.at(1000)
        rows = {tuple(numbers(line)) for line in wide}
        assert any(len(row) > 1 for row in rows), name
        for width in WIDTHS:
            lines = terminal.at(width)
            assert all(len(line) <= width for line in lines), (name, width)
            said = " ".join(lines)
            for line in lines:
                found = numbers(line)
                if len(found) < 2 or line.startswith(("=>", " ", "#", "no room", "text noise")):
                    continue
                assert any(_is_part(found, row) for row in rows), (name, width, line)
            shown = max(len(numbers(line)) for line in lines)
            whole = max(map(len, rows))
            assert shown == whole or "no room at" in said, (name, width)


def _is_part(some: list[str], row: tuple[str, ...]) -> bool:
    """Whether numbers stand in a row in that order."""
    rest = iter(row)
    return all(number in rest for number in some)


def test_a_terminal_is_as_wide_as_it_says(
    terminal: Terminal, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.collect("inspect", str(tiny_folder))
    heads = [next(line for line in terminal.at(width) if "linears" in line) for width in (60, 200)]
    assert len(heads[0]) < len(heads[1])
    assert "reason" in heads[1]


def test_tasks(terminal: Terminal) -> None:
    rows = [
        TaskRow("none", None, "none", "rtn", "only", "numbers", "acc", "none", 0.75, 0.0, None, 40),
        *(
            TaskRow(
                MIX, "nvfp4", "same", "rtn", "only", "a_long_name_of_a_task", metric,
                "strict-match", 0.625, -0.125, 0.0526, 40, "2 of 40 questions have no value",
            )
            for metric in ("acc", "acc_norm")
        ),
    ]  # fmt: skip
    terminal.shown.append((Table(rows, views.of_tasks(rows, "tiny, numbers")), {}))
    for width in WIDTHS:
        lines = terminal.at(width)
        assert all(len(line) <= width for line in lines)
        found = [numbers(line) for line in lines if line.startswith("#1") and "0.6250" in line]
        assert len(found) == 2
        assert all(row[:3] == ["0.6250", "-0.1250", "0.0526"] for row in found), found
