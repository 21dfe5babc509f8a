"""The native library: found or compiled at first use, its ops loaded into torch."""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from fp4graph.cache import cache_folder
from fp4graph.errors import OptionError
from fp4graph.kernels.cpu.build import BuildError, compile_library, library_name

_LOG = logging.getLogger("fp4graph.kernels")
FORMAT_CODES = {"nvfp4": 0, "mxfp4": 1}
"""Numbers of FP4 formats in native/fp4.h, by their `base`."""
ISA_VARIABLE = "FP4GRAPH_CPU_ISA"
NO_NATIVE = "none"
"""The value of FP4GRAPH_CPU_ISA that leaves the native library unused."""


@dataclass(frozen=True)
class Native:
    """The library, loaded.

    Attributes:
        lib: its functions outside of torch; the meaning of each stands in native/fp4.h.
        path: where it lies.
        origin: who built it, for people.
    """

    lib: ctypes.CDLL
    path: Path
    origin: str

    @property
    def isas(self) -> tuple[str, ...]:
        """The instruction sets that this CPU runs, best first."""
        names: bytes = self.lib.fp4_available()
        return tuple(names.decode().split(","))

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        name: bytes = self.lib.fp4_isa()
        return name.decode()

    def use(self, isa: str | None) -> None:
        """Use an instruction set; None for the best.

        Raises:
            OptionError: this CPU or this library does not have it.
        """
        if self.lib.fp4_use(isa.encode() if isa else None):
            raise OptionError(
                f"{ISA_VARIABLE}={isa}: this machine has {', '.join(self.isas)}, "
                f"and {NO_NATIVE} for no native kernel"
            )


@dataclass(frozen=True)
class Missing:
    """No library, and why."""

    reason: str


def find() -> Path | None:
    """Return the library that the installation built, or that an earlier use compiled."""
    return next((path for path, _ in _places() if path.is_file()), None)


@cache
def load() -> Native | Missing:
    """Load the library, after compiling it into the cache if there is none.

    Raises:
        OptionError: FP4GRAPH_CPU_ISA names an instruction set that is not there.
    """
    isa = os.environ.get(ISA_VARIABLE)
    if isa == NO_NATIVE:
        return Missing(f"{ISA_VARIABLE}={NO_NATIVE} asks for none")
    installed, cached = _places()
    try:
        if not installed[0].is_file() and not cached[0].is_file():
            _LOG.warning("compiling the CPU kernels into %s, once", cached[0].parent)
            compile_library(cached[0])
        path, origin = installed if installed[0].is_file() else cached
        torch.ops.load_library(str(path))
        lib = ctypes.CDLL(str(path))
    except (BuildError, OSError) as error:
        _LOG.warning("no native CPU kernels: %s", error)
        return Missing(str(error))
    lib.fp4_available.restype = lib.fp4_isa.restype = ctypes.c_char_p
    lib.fp4_use.argtypes = (ctypes.c_char_p,)
    native = Native(lib, path, origin)
    native.use(isa)
    return native


def native() -> Native | None:
    """Return the library, or None where there is none; see `load`."""
    found = load()
    return found if isinstance(found, Native) else None


def _places() -> tuple[tuple[Path, str], tuple[Path, str]]:
    name = library_name()
    return (
        (Path(__file__).parent / name, "built at installation"),
        (cache_folder() / "kernels" / name, "compiled at first use"),
    )
