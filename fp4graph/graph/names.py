"""What a model's weights are called: module paths by parameter, and the linears known from them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fp4graph.linears.roles import tag_by_name
from fp4graph.linears.stacks import Lists, Stacks, block_lists
from fp4graph.linears.tags import LinearTag, Role

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, MutableMapping, Sequence

    from torch import Tensor
    from torch.fx import Node

    Names = Mapping[nn.Parameter, tuple[str, ...]]

_ROOT = re.compile(r"^[A-Z]\['[^']*'\]\.?")
_MEMBER = re.compile(r"_(?:modules|parameters|buffers)\['([^']*)'\]")
_INDEX = re.compile(r"\.?\[(\d+)\]")


@dataclass(frozen=True)
class NamedLinear:
    """A linear that a model's modules tell of, traced or not.

    Attributes:
        tag: who it is.
        weight: its parameter.
        certain: whether it is a linear: its module computes one, or it is an expert's; any other
            bare matrix may be anything.
    """

    tag: LinearTag
    weight: nn.Parameter
    certain: bool


def parameter_names(model: nn.Module) -> Names:
    """Map each parameter to all paths that hold it (more than one where tied)."""
    names: MutableMapping[nn.Parameter, tuple[str, ...]] = WeakIdKeyDictionary()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter] = (*names.get(parameter, ()), _short(name))
    return names


def named_linears(model: nn.Module) -> tuple[NamedLinear, ...]:
    """Return the linears of a model from its modules, without tracing."""
    found = []
    lists = model_lists(model)
    for path, module in model.named_modules():
        stored_KN = type(module).__name__ == "Conv1D"
        for name, weight in module.named_parameters(recurse=False):
            tag_path = _short(f"{path}.{name}".lstrip("."))
            shape = tuple(weight.T.shape if stored_KN and weight.ndim == 2 else weight.shape)
            tag = tag_by_name(tag_path, shape, lists)
            if tag.role is Role.EXPERT and weight.ndim in (2, 3):
                certain = "bias" not in name
            elif weight.ndim == 2 and not isinstance(module, nn.Embedding):
                certain = name == "weight" and (stored_KN or isinstance(module, nn.Linear))
            else:
                continue
            found.append(NamedLinear(tag, weight, certain))
    stacks = Stacks.of(each.tag for each in found)
    return tuple(replace(each, tag=stacks.place(each.tag)) for each in found)


def model_lists(model: nn.Module) -> Lists:
    """Return the lists of blocks that a model's modules tell of."""
    modules = model.named_modules(remove_duplicate=False)
    matrices = (
        _short(f"{path}.{name}".lstrip("."))
        for path, module in modules
        if not isinstance(module, nn.Embedding)
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim in (2, 3) and "bias" not in name
    )
    return block_lists(matrices)


def unreached(model: nn.Module, reached: Container[Tensor]) -> Iterator[tuple[NamedLinear, str]]:
    """Yield the linears of a model that are in no graph, and why, as far as that can be seen.

    Args:
        model: the model.
        reached: the weights that some graph has.
    """
    for each in named_linears(model):
        if each.certain and each.weight not in reached:
            yield each, why_unreached(model, each)


def why_unreached(model: nn.Module, linear: NamedLinear) -> str:
    """Say why a linear is in no graph, as far as the modules above it show."""
    modules = dict(model.named_modules())
    partly = any(each.device.type != "meta" for each in model.parameters())
    hooked = any(hasattr(each, "_hf_hook") for each in modules.values())
    if linear.weight.device.type == "meta" and (partly or hooked):
        return "its weight is on the meta device between calls (offloaded), so no graph holds it"
    path = linear.tag.fqn
    while True:
        module = modules.get(path)  # None for a parameter of its own
        if getattr(getattr(module, "forward", None), "_torchdynamo_disable", False):
            return f"{path or 'the model'} is kept from compilation by torch._dynamo.disable"
        if hasattr(module, "_hf_hook"):
            return f"a hook of accelerate on {path or 'the model'} keeps it out of all graphs"
        if not path:
            return "it is in no graph: this call did not reach it, or a fused op computes it"
        path = path.rpartition(".")[0]


def names_here(placeholders: Sequence[Node], values: Sequence[Any], names: Names) -> Names:
    """Return the paths of a graph's parameters, of tied ones those of the module that it is for.

    That module is where the paths of all others begin, before what Dynamo calls them.

    Args:
        placeholders: the inputs of the outermost graph.
        values: of them.
        names: of all of the model's parameters.
    """
    pairs = zip(placeholders, values, strict=True)
    inputs = [(p, v) for p, v in pairs if isinstance(v, nn.Parameter) and v in names]
    lifted = [(names[value], _source_path(placeholder)) for placeholder, value in inputs]
    places = {known[0].removesuffix(end) for known, end in lifted if len(known) == 1}
    place = places.pop() if len(places) == 1 else ""
    here: MutableMapping[nn.Parameter, tuple[str, ...]] = WeakIdKeyDictionary()
    for _, value in inputs:
        inside = tuple(path for path in names[value] if path.startswith(place))
        here[value] = inside or names[value]
    return here


def path_of(node: Node, placeholder: Node | None, known: tuple[str, ...], *, shared: bool) -> str:
    """Return the path of the linear that a node computes.

    The weight's own name says it, but for a tied weight, which has several: there the module that
    made the call says which one is meant.

    Args:
        node: the linear.
        placeholder: the input of the outermost graph that its weight is.
        known: the weight's paths in the model, where the model is known.
        shared: whether the node was traced for another layer too, so that it knows no module.
    """
    caller = caller_of(node, shared=shared)
    lifted = "" if placeholder is None else _source_path(placeholder)
    if len(known) > 1:
        called = (path for path in known if _ends_like(path, caller))
        inside = (path for path in known if caller and f".{caller}." in f".{path}.")
        named = (path for path in known if _ends_like(path, lifted))  # as Dynamo met it first
        return next(chain(called, inside, named, known))
    if known:
        return known[0]
    if lifted and (not caller or f"{lifted}.".startswith(f"{caller}.")):
        return lifted
    depth = caller.count(".") + 1  # a tied weight may have been lifted from another layer
    *above, below = lifted.split(".", depth) if lifted.count(".") >= depth else ("",)
    if below and _kind(".".join(above)) == _kind(caller):
        return f"{caller}.{below}"
    return caller or lifted or node.name


def caller_of(node: Node, *, shared: bool) -> str:
    """Return the path of the module whose forward makes a call; empty where unknown.

    Args:
        node: the call.
        shared: see `path_of`.
    """
    stack = {} if shared else node.meta.get("nn_module_stack") or {}
    return _clean(next(reversed(stack.values()))[0]) if stack else ""


def _kind(path: str) -> str:
    """Return a path without its numbers."""
    return re.sub(r"\d+", "", path)


def _ends_like(path: str, end: str) -> bool:
    return bool(end) and f".{path}".endswith(f".{end}")


def _source_path(placeholder: Node) -> str:
    """Return the path that Dynamo noted for a lifted parameter."""
    argument = placeholder.meta.get("grapharg")
    if argument is None:
        return _short(str(placeholder.target))
    return _short(_clean(argument.source.name))


def _clean(source: str) -> str:
    """Turn Dynamo's `L['self']._modules['layers'][0]` into `layers.0`."""
    path = _INDEX.sub(r".\1", _MEMBER.sub(r"\1", _ROOT.sub("", source)))
    return path.strip(".")


def _short(name: str) -> str:
    return name.removesuffix(".weight")
