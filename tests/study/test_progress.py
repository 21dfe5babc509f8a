"""Progress for whoever watches: lines in a log, an ETA that knows the budget, kept results."""

from __future__ import annotations

import sys
import types
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from support.trials import plan

from fp4graph.study import progress
from fp4graph.study.forecast import Forecast
from fp4graph.study.progress import Bar, Lines, Live, Notebook, shown


class Clock:
    """Time that passes as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def log() -> tuple[Lines, StringIO]:
    out = StringIO()
    return Lines(Console(file=out, width=200)), out


def test_a_log_has_a_line_every_half_minute_and_one_a_result(clock: Clock) -> None:
    lines, out = log()
    lines.start(100, "trials", 10)
    for _ in range(60):
        clock.now += 1.0
        lines.advance()
    assert len(out.getvalue().splitlines()) == 2
    lines.ended("only q in nvfp4 W4A16", object())
    last = out.getvalue().splitlines()[-1]
    assert last == "1 of 10 trials, 0:01:00, ETA 0:00:40: only q in nvfp4 W4A16"


def test_the_eta_knows_the_budget_and_kept_results_are_counted(clock: Clock) -> None:
    lines, out = log()
    lines.start(100, "trials", 10, budget=30.0)
    lines.ended("only v in nvfp4 W4A16", object(), kept=True)
    clock.now = 20.0
    lines.advance()
    assert lines.status == "1 of 10 trials (1 kept), 0:00:20, ETA 0:00:10 (--budget)"
    assert "only v in nvfp4 W4A16 (kept)" in out.getvalue()


def test_a_run_that_is_kept_whole_is_done_at_once(clock: Clock) -> None:
    lines, _ = log()
    lines.start(0, "trials", 2)
    for _ in range(2):
        lines.ended("x", object(), kept=True)
    assert lines.share == 1.0
    assert lines.status == "2 of 2 trials (2 kept), 0:00:00"


def test_a_bar_fits_its_terminal(clock: Clock) -> None:
    out = StringIO()
    with Bar(Console(file=out, width=60, force_terminal=True)) as bar:
        bar.start(3, "windows")
        clock.now = 65.0
        bar.advance("a very long description of what has just been done, and more of it")
        assert bar.status == "1 of 3 windows, 0:01:05, ETA 0:02:10"


def test_a_notebook_gets_one_line_that_changes(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            written.append(data["text/plain"])

    def display(data: dict[str, str], raw: bool, display_id: bool = False) -> Handle:
        return Handle()

    shell = types.SimpleNamespace(kernel=object())
    module: Any = types.ModuleType("IPython")
    module.get_ipython = lambda: shell
    inner: Any = types.ModuleType("IPython.display")
    inner.display = display
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    with shown() as told:
        assert isinstance(told, Notebook)
        told.start(2, "windows")
        for _ in range(2):
            clock.now += 2.0
            told.advance()
    assert written[-1] == "2 of 2 windows, 0:00:04"


def test_what_is_given_is_told() -> None:
    mine = Live()
    with shown(mine) as told:
        assert told is mine


def test_a_forecast_counts_what_a_budget_is_enough_for() -> None:
    sizes = 2_000_000_000, 1_000_000_000, 150_000_000
    forecast = Forecast(10, 4, (5.0, 5.0, 10.0, 10.0), *sizes)
    assert str(forecast) == (
        "10 trials, 6 of them kept from before, 4 windows each: about 0:00:30; 1.0 GB of weights "
        "in memory, up to 0.1 GB of packed ones, 2.0 GB on disk for the dense model's predictions"
    )
    assert forecast.done_in(12.0) == 6 + 2
    assert forecast.done_in(0.1) == 6 + 1, "one trial is always begun"
    assert (
        str(Forecast(3, 4, (), 0, 0, 0)) == "3 trials, 3 of them kept from before: nothing to run"
    )


def test_plans_are_named_for_people() -> None:
    assert [str(trial) for trial in plan("q")] == ["the dense model", "only q in nvfp4 W4A16"]
