"""What hardware a kernel is chosen for: the only file that asks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fp4graph.errors import OptionError


@dataclass(frozen=True)
class Target:
    """A device as kernels see it.

    Attributes:
        backend: `cpu`, `cuda`, `hip`, or another device type of torch.
        arch: `sm_90`, `gfx950`; empty where it does not matter.
        multiprocessors: how many there are; 1 where it does not matter.
    """

    backend: str
    arch: str = ""
    multiprocessors: int = 1

    def __str__(self) -> str:
        return ":".join(filter(None, (self.backend, self.arch)))

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability, 90 for sm_90; 0 for what is not NVIDIA's."""
        return int(self.arch.removeprefix("sm_")) if self.backend == "cuda" else 0


# The device that each compute capability is best known by, and how many multiprocessors it has.
_KNOWN = {
    each.arch: each
    for each in (
        Target("cuda", "sm_80", 108),  # A100
        Target("cuda", "sm_90", 132),  # H100, H200
        Target("cuda", "sm_100", 148),  # B200
        Target("cuda", "sm_120", 170),  # RTX 5090
        Target("hip", "gfx942", 304),  # MI300X
        Target("hip", "gfx950", 256),  # MI355X
    )
}


def parse_target(text: str) -> Target:
    """Return the target that `cpu`, `cuda:sm_100`, `hip:gfx950` or `cuda:gfx950` names.

    It need not be in this machine.

    Raises:
        OptionError: no such target; the message lists those that are known.
    """
    backend, _, arch = text.partition(":")
    if text == "cpu":
        return Target("cpu")
    found = _KNOWN.get(arch)
    if found is None or backend not in ("cuda", found.backend):
        known = ", ".join(["cpu", *map(str, _KNOWN.values())])
        raise OptionError(f"unknown device {text!r}; known ones are {known}")
    return found


@lru_cache
def target_of(device: torch.device) -> Target:
    """Ask what a device is."""
    if device.type != "cuda":
        return Target(device.type)
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", found.gcnArchName.split(":")[0], found.multi_processor_count)
    return Target("cuda", f"sm_{found.major}{found.minor}", found.multi_processor_count)
