"""How far a run is, for whoever watches it: a bar, lines in a log, or a line in a notebook."""

from __future__ import annotations

import math
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_EVERY_S = 30.0


class Progress:
    """Is told how far a run is; this one says nothing."""

    def start(
        self, steps: int, what: str, total: int | None = None, budget: float = math.inf
    ) -> None:
        """A run begins.

        Args:
            steps: how many calls of `advance` it takes.
            what: what is counted, in the plural: `trials`.
            total: how many of them, kept ones included, each told by `ended`; None: as many as
                there are steps.
            budget: seconds after which nothing more is begun.
        """

    def advance(self, what: str = "") -> None:
        """A step is done; `what` says what it was."""

    def within(self, what: str) -> None:
        """A part of a long step is done; `what` says which."""

    def ended(self, what: str, row: object, *, kept: bool = False) -> None:
        """A result is there, or was kept from an earlier run."""

    def note(self, text: str) -> None:
        """Something that a user should know before the run."""

    def counted(self, what: str) -> Callable[[int, int], None]:
        """Return what `fp4graph.calibrate` tells how many of how many are done, from 0 on."""

        def told(done: int, total: int) -> None:
            if done:
                self.advance()
            else:
                self.start(total, what)

        return told


SILENT = Progress()


class Live(Progress):
    """Counts, and knows how long it will take; how that is shown is up to others."""

    def __init__(self) -> None:
        self._what = ""
        self._steps = self._step = self._done = self._kept = 0
        self._total: int | None = None
        self._budget = math.inf
        self._since = time.monotonic()

    def start(
        self, steps: int, what: str, total: int | None = None, budget: float = math.inf
    ) -> None:
        """See the class."""
        self._what, self._steps, self._total, self._budget = what, steps, total, budget
        self._step = self._done = self._kept = 0
        self._since = time.monotonic()
        self.show("")

    def advance(self, what: str = "") -> None:
        """See the class."""
        self._step += 1
        self.show(what)

    def within(self, what: str) -> None:
        """See the class."""
        self.show(what)

    def ended(self, what: str, row: object, *, kept: bool = False) -> None:
        """See the class."""
        self._done += 1
        self._kept += kept
        self.show(f"{what} (kept)" if kept else what, ended=True)

    def show(self, what: str, *, ended: bool = False) -> None:
        """Show `status`; called after every step, and after every result."""
        raise NotImplementedError

    @property
    def share(self) -> float:
        """How much of the work is done, 0 to 1."""
        return self._step / self._steps if self._steps else 1.0

    @property
    def status(self) -> str:
        """How far it is: `12 of 420 trials (3 kept), 0:01:00, ETA 0:20:00`."""
        elapsed = time.monotonic() - self._since
        count = (self._step, self._steps) if self._total is None else (self._done, self._total)
        kept = f" ({self._kept} kept)" if self._kept else ""
        text = f"{count[0]} of {count[1]} {self._what}{kept}, {duration(elapsed)}"
        if self._step and self._step < self._steps:
            rest = elapsed / self._step * (self._steps - self._step)
            within = max(self._budget - elapsed, 0.0)
            text += f", ETA {duration(min(rest, within))}"
            text += " (--budget)" if within < rest else ""
        return text


class Lines(Live):
    """Writes a line for every result, and one at least every 30 s: for logs."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._last = time.monotonic()

    def note(self, text: str) -> None:
        """See the class."""
        self._console.print(text, soft_wrap=True, markup=False)

    def show(self, what: str, *, ended: bool = False) -> None:
        """See the class."""
        now = time.monotonic()
        if ended or now - self._last >= _EVERY_S:
            self._last = now
            self.note(f"{self.status}{f': {what}' if what else ''}")


class Bar(Live):
    """Draws a bar on a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._bar = RichProgress(
            BarColumn(24), TextColumn("{task.description}", markup=False), console=console
        )
        self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """See the class."""
        self._console.print(text, markup=False)

    def show(self, what: str, *, ended: bool = False) -> None:
        """See the class."""
        room = self._console.width - 26
        text = f"{self.status}  {what}" if what else self.status
        text = text if len(text) <= room else text[: room - 1] + "…"
        self._bar.update(self._task, completed=self.share, description=text)


class Notebook(Live):
    """Writes one line under a cell, and again over it."""

    def __init__(self) -> None:
        super().__init__()
        from IPython.display import display

        self._display: Any = display
        self._handle = self._display({"text/plain": ""}, raw=True, display_id=True)
        self._last = 0.0

    def note(self, text: str) -> None:
        """See the class."""
        self._display({"text/plain": text}, raw=True)

    def show(self, what: str, *, ended: bool = False) -> None:
        """See the class."""
        now = time.monotonic()
        if now - self._last >= 1.0 or self._step == self._steps:
            self._last = now
            self._handle.update({"text/plain": self.status}, raw=True)


@contextmanager
def shown(progress: Progress | None = None) -> Iterator[Progress]:
    """Yield what to tell progress to: what is given, or what suits where this runs.

    That is a notebook's output, a terminal, or lines on stderr.
    """
    if progress is not None:
        yield progress
    elif "IPython" in sys.modules and _in_notebook():
        yield Notebook()
    elif sys.stderr.isatty():
        with Bar(Console(stderr=True, highlight=False)) as bar:
            yield bar
    else:
        yield Lines(Console(stderr=True, highlight=False))


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


def duration(seconds: float) -> str:
    """Return a time as people say it: `0:01:05`."""
    return str(timedelta(seconds=round(seconds)))
