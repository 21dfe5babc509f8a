"""The backend by its name, `torch.compile(model, backend="fp4graph", options={...})`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from fp4graph.compiler import Backend, backend
from fp4graph.dynamo import raiser
from fp4graph.errors import Fp4GraphError, OptionError
from fp4graph.private import running_call

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

    from torch.fx import GraphModule


def dynamo_backend(
    gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any
) -> Callable[..., Any]:
    """Serve `torch.compile(model, backend="fp4graph", options={"select": "attn"})`.

    Options are the arguments of `backend`; one that does not exist raises OptionError.
    """
    options = dict(kwargs.pop("options", None) or {})
    try:
        made = _named_backend(options)
    except Fp4GraphError as error:
        return raiser(error)
    return made(gm, example_inputs, **kwargs)


_NAMED: MutableMapping[Any, Backend] = WeakKeyDictionary()


def _named_backend(options: dict[str, Any]) -> Backend:
    """Return the one backend of a compiled function, for all its graphs."""
    frame = running_call()
    context = frame.f_locals["self"] if frame else None
    if context in _NAMED:
        return _NAMED[context]
    try:
        made = backend(**options)
    except TypeError as error:
        problem = str(error).replace(
            "backend() got an unexpected keyword argument", "no such option:"
        )
        raise OptionError(problem) from None
    if context is not None:
        _NAMED[context] = made
    return made
