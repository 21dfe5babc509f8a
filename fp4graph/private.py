"""All that fp4graph uses of torch that is private to it, each with what it is needed for.

Supported are torch 2.13 to 2.15. `make newest` runs the quick tests on another version than the one
that CI has, and tests/test_torch_private.py names what a version lacks. What differs from one to
the next is told apart here and nowhere else.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from fp4graph.errors import TorchVersionError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType, FunctionType

    from torch.fx import Node

NEEDED = {
    "torch._C._set_grad_enabled": "graphs that switch gradients on or off",
    "torch._C._autograd._get_data_attr": "weights that are read as `weight.data`",
    "torch._C._get_dispatch_mode": "no fake table of codes is kept",
    "torch._C._TorchDispatchModeKey.FAKE": "the same",
    "torch._C._nn": "which functions are torch's own",
    "torch._ops.HigherOrderOperator": "bodies of checkpoints, branches and nested regions",
    "torch._ops.OpOverload": "ops by their schemas",
    "torch._ops.OpOverloadPacket": "the same",
    "torch._guards.TracingContext": "whether Dynamo is tracing",
    "torch._dynamo.guards.GuardBuilder": "a graph is run for the module that it was made for",
    "torch._dynamo.guards.install_guard": "the same",
    "torch._dynamo.source.NNModuleSource": "the same",
    "torch._dynamo.source.ConstantSource": "packed weights as buffers that AOTAutograd accepts",
    "torch._dynamo.eval_frame.innermost_backend": "which backend a call is compiled for",
    "torch._dynamo.eval_frame._stance": "calls that set_stance runs in the plain model",
    "torch._dynamo.eval_frame.set_code_exec_strategy": "modules of a class that Dynamo skips",
    "torch._dynamo.external_utils.wrap_inline": "the same, of torch's own classes",
    "torch._dynamo.types.FrameAction.DEFAULT": "the same",
    "torch._dynamo.types.FrameExecStrategy": "the same",
    "torch._dynamo.callback.callback_handler.start_callbacks": "calls are followed from the start",
    "torch._dynamo.config._config": "more than 8 graphs a function",
    "torch._dynamo.config._make_closure_patcher": "no silent fallback to the plain model",
    "torch._dynamo.utils.counters": "graph breaks in `latency`",
    "torch._inductor.list_mode_options": "torch.compile's modes",
    "torch._inductor.compile_fx.compile_fx": "inner='inductor'",
}
"""Names, and what would go with them."""


def _resolve(path: str) -> Any:
    parts = path.split(".")
    value: Any = torch
    for place in range(1, len(parts)):
        try:
            value = getattr(value, parts[place])
        except AttributeError:
            try:
                value = import_module(".".join(parts[: place + 1]))
            except ImportError:
                raise TorchVersionError(
                    f"torch {torch.__version__} has no {path}, needed for: {NEEDED[path]}; "
                    "fp4graph supports torch 2.13 to 2.15"
                ) from None
    return value


_FOUND = {path: _resolve(path) for path in NEEDED}
OpOverloadPacket = _FOUND["torch._ops.OpOverloadPacket"]
SET_GRAD_ENABLED = _FOUND["torch._C._set_grad_enabled"]
GET_DATA = _FOUND["torch._C._autograd._get_data_attr"]
NN_FUNCTIONS = _FOUND["torch._C._nn"]
TracingContext = _FOUND["torch._guards.TracingContext"]
GuardBuilder = _FOUND["torch._dynamo.guards.GuardBuilder"]
install_guard = _FOUND["torch._dynamo.guards.install_guard"]
NNModuleSource = _FOUND["torch._dynamo.source.NNModuleSource"]
ConstantSource = _FOUND["torch._dynamo.source.ConstantSource"]
innermost_backend = _FOUND["torch._dynamo.eval_frame.innermost_backend"]
list_mode_options = _FOUND["torch._inductor.list_mode_options"]
compile_fx = _FOUND["torch._inductor.compile_fx.compile_fx"]
counters = _FOUND["torch._dynamo.utils.counters"]

CALL_LOCALS = ("fn", "args", "kwargs", "self", "cleanups")
"""Names that are read in the frame of a compiled function's call."""


_ATTRIBUTES = {"numpy_T": "T", "mT": "mT"}  # ops of torch 2.14 on; before it is getattr


def attribute_of(node: Node) -> str | None:
    """Return the name of the attribute that a node reads, such as `T`; None if it reads none."""
    if node.target is getattr:
        return str(node.args[1])
    if isinstance(node.target, OpOverloadPacket):
        return _ATTRIBUTES.get(node.target.__name__)
    return None


def is_faking() -> bool:
    """Whether tensors made now are fake ones."""
    fake = torch._C._TorchDispatchModeKey.FAKE
    return torch._C._get_dispatch_mode(fake) is not None


def stance() -> str:
    """Return what `torch.compiler.set_stance` has set last."""
    return str(_resolve("torch._dynamo.eval_frame._stance").stance)  # another object each time


def trace_again(functions: Iterable[FunctionType]) -> None:
    """Let Dynamo look at code again that it has decided to skip for good.

    Args:
        functions: what is to be traced; what torch calls modules of its own through comes to it.
    """
    default = _FOUND["torch._dynamo.types.FrameAction.DEFAULT"]
    strategy = _FOUND["torch._dynamo.types.FrameExecStrategy"](default, default)
    inline = _FOUND["torch._dynamo.external_utils.wrap_inline"](len)
    for function in (inline, *functions):
        _FOUND["torch._dynamo.eval_frame.set_code_exec_strategy"](function.__code__, strategy)


def start_callbacks() -> list[Any]:
    """Return what Dynamo calls when it starts to compile a frame; to be added to."""
    found: list[Any] = torch._dynamo.callback.callback_handler.start_callbacks
    return found


def setting(name: str) -> Any:
    """Return the entry of a Dynamo setting, whose `default` counts in every thread."""
    return torch._dynamo.config._config[name]  # type: ignore[attr-defined]


def settings_patcher(**values: Any) -> Any:
    """Return a function that sets Dynamo's settings and returns one that sets them back."""
    return torch._dynamo.config._make_closure_patcher(**values)


def running_call() -> FrameType | None:
    """Return the frame of the innermost call of a compiled function, seen from within it.

    Raises:
        TorchVersionError: there is a call, and it is not what it is in the versions that are known.
    """
    file = import_module("torch._dynamo.eval_frame").__file__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename == file:
            missing = [name for name in CALL_LOCALS if name not in frame.f_locals]
            if missing:
                raise TorchVersionError(
                    f"torch {torch.__version__}: a compiled call has no `{missing[0]}`, by which "
                    "fp4graph follows it; it supports torch 2.13 to 2.15"
                )
            return frame
        frame = frame.f_back
    return None


def required_call() -> FrameType | None:
    """Return the same where Dynamo is compiling for a call; None where nobody is.

    Raises:
        TorchVersionError: Dynamo is compiling, and the call for which it does is not found.
    """
    frame = running_call()
    if frame is None and TracingContext.try_get() is not None:
        raise TorchVersionError(
            f"torch {torch.__version__}: the call that is being compiled is not found, so nothing "
            "could be said of what runs in the plain model; fp4graph supports torch 2.13 to 2.15"
        )
    return frame
