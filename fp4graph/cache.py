"""Where fp4graph keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return FP4GRAPH_CACHE, or else `fp4graph` in the user's cache folder."""
    given = os.environ.get("FP4GRAPH_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(home) / "fp4graph"
