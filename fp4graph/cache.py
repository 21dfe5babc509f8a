"""Where fp4graph keeps what it can make again."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path


def cache_folder() -> Path:
    """Return FP4GRAPH_CACHE, or else `fp4graph` in the user's cache folder."""
    given = os.environ.get("FP4GRAPH_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(home) / "fp4graph"


def kept_file(what: str, *facts: object) -> Path:
    """Return the file for what was measured on this machine, with these versions.

    Args:
        what: was measured; the folder.
        facts: that decide what comes out, besides the versions of torch and fp4graph.
    """
    every = (*facts, version("torch"), version("fp4graph"))
    called = "-".join("".join(c if c.isalnum() else "_" for c in str(each)) for each in every)
    return cache_folder() / what / f"{called}.json"
