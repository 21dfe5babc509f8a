"""What machine this is, for whoever reads a result later."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Return the processor's name, or its architecture where nobody knows more."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
