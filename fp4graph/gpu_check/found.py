"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

STEPS = {
    "exact": ("problems checked", 120),
    "faults": ("numbers of rows with faults", 30),
    "cuts": ("weights cut", 180),
    "times": ("sizes timed", 120),
    "model": ("models timed", 150),
}
"""What is counted, and after how many seconds nothing more is begun; what was begun ends."""


@dataclass
class Found:
    """What a check found, step by step.

    Attributes:
        environment: the device and what runs on it.
        rows: of each step, dataclasses.
        left_out: of each step, what there was no time for.
        errors: of each step, what failed and why.
        seconds: that each step took.
        when: it began, ISO 8601, UTC.
        is_measured: whether there was a device.
    """

    environment: dict[str, Any]
    rows: dict[str, list[Any]] = field(default_factory=lambda: {step: [] for step in STEPS})
    left_out: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    when: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    is_measured: bool = True

    @property
    def is_right(self) -> bool:
        """Whether nothing failed, all kernels are right, and each seeded fault was seen."""
        right = all(row.ok for row in self.rows["exact"])
        return right and all(row.found for row in self.rows["faults"]) and not self.errors
