"""A model whose forward runs through a backend, for studies that call the model by its methods."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from fp4graph import StudyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from fp4graph.compiler import Backend


def compiled(model: nn.Module, backend: Backend, **options: Any) -> Callable[..., Any]:
    """Compile a model's forward with a backend; each call proves that it ran what was compiled.

    Args:
        model: the model.
        backend: what compiles it, made for this model alone.
        options: further ones of `torch.compile`.

    Returns:
        a function like `model.forward`. It raises StudyError where a call ran no graph of the
        backend's, or where none of them has a linear in FP4 though the backend selects some.
    """
    forward = model.forward
    run = torch.compile(forward, backend=backend, **options)
    selects = not backend.policy.is_none

    @functools.wraps(forward)
    def proved(*args: Any, **kwargs: Any) -> Any:
        with backend.runs.required():
            out = run(*args, **kwargs)
        if selects and not any(row.selected for row in backend.report):
            raise StudyError("the model did not run as selected")
        return out

    return proved


@contextmanager
def forward_replaced(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a model's `forward` be another within: methods such as `generate` call it too."""
    own = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own
