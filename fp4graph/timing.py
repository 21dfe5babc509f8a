"""What is timed on a machine, and kept there: calls that alternate, and files for what came out."""

from __future__ import annotations

import json
import logging
import statistics
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fp4graph.cache import cache_folder
from fp4graph.files import read_text, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

BUSY = 1.5  # times the least
_LOG = logging.getLogger("fp4graph.timing")


def alternated(
    calls: Sequence[Callable[[], object]], rounds: int, wait: Callable[[], object] = lambda: None
) -> list[list[float]]:
    """Return the seconds of each call, by round.

    Each round runs every call once, in an order that rotates. One round before warms up.

    Args:
        calls: what to time.
        rounds: that count.
        wait: waits for an accelerator.
    """
    taken: list[list[float]] = [[] for _ in calls]
    both = list(zip(calls, taken, strict=True))
    for number in range(rounds + 1):
        turn = number % len(both)
        for call, seconds in both[turn:] + both[:turn]:
            wait()
            start = time.perf_counter()
            call()
            wait()
            seconds.append(time.perf_counter() - start)
    return [each[1:] for each in taken]


def is_quiet(times: Sequence[Sequence[float]]) -> bool:
    """Whether medians are near the least: else the machine was busy with something else."""
    return all(statistics.median(each) < BUSY * min(each) for each in times)


def kept_file(what: str, *facts: object) -> Path:
    """Return the file for what was measured on this machine, with these versions.

    Args:
        what: was measured; the folder.
        facts: that decide what comes out, besides the versions of torch and fp4graph.
    """
    every = (*facts, version("torch"), version("fp4graph"))
    called = "-".join("".join(c if c.isalnum() else "_" for c in str(each)) for each in every)
    return cache_folder() / what / f"{called}.json"


def kept(file: Path) -> dict[str, Any]:
    """Return what a file keeps; nothing where there is none, or with a warning none that reads."""
    try:
        found = json.loads(read_text(file))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _LOG.warning("%s cannot be read and does not count: %s", file, error)
        return {}
    return found


def keep(file: Path, more: Mapping[str, Any]) -> None:
    """Keep more beside what a file keeps.

    Raises:
        OSError: it cannot be written.
    """
    write_text(file, json.dumps(kept(file) | dict(more), indent=0) + "\n")
