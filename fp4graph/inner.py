"""The inner compilers, which get the rewritten graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from fp4graph.errors import OptionError
from fp4graph.private import compile_fx, list_mode_options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.fx import GraphModule

    CompilerFn = Callable[..., Callable[..., Any]]

NAMES = ("inductor", "eager")


def read_mode(kwargs: dict[str, Any]) -> str | None:
    """Return the mode among what torch.compile passes on to a backend, None for the default.

    Raises:
        OptionError: an unknown mode, or anything else.
    """
    unknown = sorted(name for name, value in kwargs.items() if name != "mode" and value)
    if unknown:
        raise OptionError(
            f"torch.compile passed {unknown[0]}={kwargs[unknown[0]]!r}, which backend() does not "
            'take: give options to backend(...), or name the backend: backend="fp4graph"'
        )
    mode = kwargs.get("mode")
    if mode is not None and mode not in list_mode_options():
        raise OptionError(f"mode={mode!r}: expected {', '.join(list_mode_options())}")
    return None if mode in (None, "default") else str(mode)


def compile_inner(
    inner: str | CompilerFn, gm: GraphModule, example_inputs: Sequence[Any], mode: str | None
) -> Callable[..., Any]:
    """Compile a rewritten graph with `eager`, `inductor` or a backend function."""
    if inner == "eager":
        return gm.forward
    if inner == "inductor":
        patches = list_mode_options(mode) if mode else None
        return cast(
            "Callable[..., Any]", compile_fx(gm, list(example_inputs), config_patches=patches)
        )
    assert callable(inner)
    return inner(gm, example_inputs)
