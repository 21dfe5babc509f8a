"""What is asked of Dynamo beyond its public face, in one place."""

from __future__ import annotations

import inspect
import sys
import threading
from collections import Counter
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fp4graph.errors import RecompileError, StudyError
from fp4graph.private import (
    GuardBuilder,
    NNModuleSource,
    TracingContext,
    innermost_backend,
    install_guard,
    running_call,
    setting,
    settings_patcher,
    stance,
    start_callbacks,
    trace_again,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping, Sequence
    from types import FrameType

    from torch.fx import GraphModule, Node

    from fp4graph.errors import Fp4GraphError
    from fp4graph.graph_runs import GraphRuns

GRAPHS_A_FUNCTION = 16
"""How many graphs one backend compiles for one function; Dynamo alone stops at 8, silently."""


def pin_to_owners(gm: GraphModule) -> None:
    """Make Dynamo recompile where another module's parameters would come into the graph.

    Parameters are inputs of a graph, so Dynamo runs the graph of one decoder layer for all of them
    where layers are compiled alone, or after a graph break between them. What was decided for the
    first would then hold for all, and each call would pack the weights of another layer. The guard
    is on the outermost module that the function reaches the parameters by, and on a parameter that
    comes without one.
    """
    if TracingContext.try_get() is None:
        return
    owners = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            owners.update({source.name: source for source in _owner(node)})
    for source in owners.values():
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def _owner(placeholder: Node) -> Iterator[Any]:
    argument = placeholder.meta.get("grapharg")
    if argument is None or not isinstance(argument.example, nn.Parameter):
        return
    owner = source = argument.source
    while source is not None:
        if isinstance(source, NNModuleSource):
            owner = source.base
        source = getattr(source, "base", None)
    yield owner


def make_room_for_graphs() -> None:
    """Let one more backend compile its graphs, whichever thread calls it.

    Dynamo counts the graphs of all backends together, and past `recompile_limit` it runs the plain
    model without a word: an ablation over nine selectors would report the ninth as undamaged. Its
    settings are per thread, so the default is raised, which every thread sees, and what this
    thread has set itself.
    """
    config = torch._dynamo.config
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        before = getattr(config, name)
        entry = setting(name)
        entry.default += GRAPHS_A_FUNCTION
        if getattr(config, name) == before:
            setattr(config, name, before + GRAPHS_A_FUNCTION)


def trace_modules_again(model: nn.Module | None) -> None:
    """Let Dynamo trace a model's modules, or torch's own, whatever it made of others of a class.

    A call that computes nothing, such as that of an empty `Sequential`, makes Dynamo skip the code
    for good: later models of that class ran dense without a word. What `torch.compiler.disable`
    excludes stays excluded.
    """
    modules = () if model is None else model.modules()
    found = {type(module).forward for module in modules}
    trace_again(
        forward
        for forward in found
        if isinstance(forward, FunctionType) and not hasattr(forward, "_torchdynamo_disable")
    )


class CallWatch:
    """Follows the calls of the compiled functions that a backend compiles for.

    Dynamo tells a backend of graphs only. What holds of a whole call, of all its graphs and of what
    it ran outside of them, can be said when the call ends. A watch is set on a function when Dynamo
    first tries to compile a frame of it, and stays; while such a call runs, Dynamo's fallback to
    the plain model is an error.

    Args:
        before: called at the start of each later call; may raise.
        after: called at the end of each call in which Dynamo compiled something and nothing was
            raised, with the modules that the called function can reach; may raise.
        runs: counts how often the backend's graphs run.

    Raises:
        StudyError: a later call ran none of them, for `torch.compiler.set_stance` tells Dynamo to
            run the plain model.
    """

    def __init__(
        self,
        before: Callable[[], None],
        after: Callable[[tuple[nn.Module, ...]], None],
        runs: GraphRuns,
    ) -> None:
        listeners = start_callbacks()
        if _compilation_starts not in listeners:  # torch._dynamo.reset() forgets it
            listeners.append(_compilation_starts)
        self._before = before
        self._after = after
        self._runs = runs
        self._watched: WeakSet[Any] = WeakSet()
        self._here = threading.local()
        self._no_fallback = settings_patcher(fail_on_recompile_limit_hit=True)

    def follow(self, frame: FrameType | None) -> None:
        """Follow the call that runs in a frame, in which something is being compiled."""
        if frame is None:
            return
        call = frame.f_locals
        self._here.modules = _modules_of(call["fn"], call["args"], call["kwargs"])
        self._here.outer = sys.exception()  # where the call is made in an except clause
        context = call["self"]
        if context not in self._watched:
            self._watched.add(context)
            context.enter_exit_hooks.append(self._enter)
            call["cleanups"].append(self._start())

    def _enter(self) -> Callable[[], None]:
        self._before()
        leave = self._start()
        if stance() == "default":
            return leave
        return partial(self._leave_stance, leave, self._runs.count)

    def _leave_stance(self, leave: Callable[[], None], before: int) -> None:
        leave()
        if self._runs.count == before and sys.exception() in (None, self._here.outer):
            raise StudyError(
                f"torch.compiler.set_stance({stance()!r}) ran this call in the plain model, dense"
            )

    def _start(self) -> Callable[[], None]:
        strict = not torch._dynamo.config.suppress_errors  # Dynamo forbids both
        return partial(self._leave, self._no_fallback() if strict else None)

    def _leave(self, revert: Callable[[], None] | None) -> None:
        if revert is not None:
            revert()
        modules = getattr(self._here, "modules", None)
        self._here.modules = None
        if modules is not None and sys.exception() in (None, self._here.outer):
            self._after(modules)


def called_module() -> nn.Module | None:
    """Return the module whose call is being compiled, seen from within it; None if not just one."""
    frame = running_call()
    if frame is None:
        return None
    call = frame.f_locals
    found = _modules_of(call["fn"], (), {})
    return found[0] if len(found) == 1 else None


def _modules_of(fn: Any, args: Any, kwargs: Any) -> tuple[nn.Module, ...]:
    """Return the modules that a call can reach: its object, its arguments, what its code names."""
    while isinstance(fn, partial):
        args, kwargs, fn = (fn.args, args), (fn.keywords, kwargs), fn.func
    function = getattr(fn, "__func__", fn)
    reach = [fn, getattr(fn, "__self__", None), *tree_leaves((args, kwargs))]
    if isinstance(function, FunctionType):
        found = inspect.getclosurevars(function)
        reach += [*found.nonlocals.values(), *found.globals.values()]
    return tuple(value for value in reach if isinstance(value, nn.Module))


def _compilation_starts(args: object) -> None:
    """Set the watch of the backend for which a frame is compiled, be there a graph in it or not."""
    frame = running_call()
    if frame is not None:
        wrapper = innermost_backend(frame.f_locals["self"].callback)
        watch = getattr(getattr(wrapper, "compiler_fn", wrapper), "watch", None)
        if isinstance(watch, CallWatch):
            watch.follow(frame)


class GraphCount:
    """Counts graphs by function and by whose parameters they run.

    Raises:
        RecompileError: `add` was called for more than GRAPHS_A_FUNCTION graphs.
    """

    def __init__(self) -> None:
        self._counts: MutableMapping[nn.Parameter, Counter[int]] = WeakIdKeyDictionary()

    def add(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """Count a graph; one without parameters does not matter."""
        first = next((each for each in example_inputs if isinstance(each, nn.Parameter)), None)
        compile_id = gm.meta.get("dynamo_compile_id")
        if first is None or compile_id is None:
            return
        counts = self._counts.setdefault(first, Counter())
        counts[compile_id.frame_id] += 1
        if counts[compile_id.frame_id] > GRAPHS_A_FUNCTION:
            raise RecompileError(
                f"{GRAPHS_A_FUNCTION} graphs were compiled for one function and one more is asked "
                "for, mostly because shapes differ from call to call: use torch.compile(..., "
                "dynamic=True), or torch._dynamo.reset() if the old ones are no longer needed"
            )

    def clear(self) -> None:
        """Forget all, as `torch._dynamo.reset()` does."""
        self._counts.clear()


def raiser(error: Fp4GraphError) -> Callable[..., Any]:
    """Return a compiled graph that raises: out of a backend Dynamo would wrap the error."""

    def raise_error(*args: Any) -> Any:
        raise error.with_traceback(None)

    return raise_error
