"""tag: find the linears of a graph and say who each one is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fp4graph.passes.match import LinearForm, match_linear
from fp4graph.passes.site import LinearSite, mark, sites
from fp4graph.roles import block_of, role_of
from fp4graph.tags import LinearTag, Role

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

    from torch.fx import GraphModule, Node

    Names = Mapping[nn.Parameter, tuple[str, ...]]

_EXPERTS = "stacked expert weights are not supported yet"
_NO_PARAMETER = "its weight is no nn.Parameter"
_ROOT = re.compile(r"^[A-Z]\['[^']*'\]\.?")
_MEMBER = re.compile(r"_(?:modules|parameters|buffers)\['([^']*)'\]")


@dataclass(frozen=True)
class TagLinears:
    """Tag every linear with its path, role, block and shape.

    Given:
        q = torch._C._nn.linear(x, l_self_..._layers_modules_0_..._q_proj_parameters_weight_, None)
    Result:
        the same node, marked LinearTag("model.layers.0.self_attn.q_proj", Role.Q, block=0, ...)

    The role comes from the module that made the call (`nn_module_stack`), the weight from the
    graph input: they differ for a tied lm_head. Stacked experts are marked on the first node that
    reads them, as unsupported, so that they leave a row in the report too.

    Attributes:
        names: module paths by parameter, from `parameter_names(model)`; where given, paths are
            whole even if a submodule is compiled alone.
        num_blocks: blocks of the model; None counts those in the graph.
    """

    name: ClassVar[str] = "tag"
    names: Names = field(default_factory=dict)
    num_blocks: int | None = None

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """See the class."""
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        index = {node: i for i, node in enumerate(placeholders)}
        for node in gm.graph.nodes:
            form = match_linear(node)
            if form is not None:
                self._mark_linear(node, form, index, example_inputs)
        for node, i in index.items():
            self._mark_experts(node, example_inputs[i], i)
        found = list(sites(gm))
        blocks = [site.tag.block for _, site in found if site.tag.block is not None]
        total = self.num_blocks or (max(blocks) + 1 if blocks else None)
        for node, site in found:
            mark(node, replace(site, tag=replace(site.tag, num_blocks=total)))

    def _mark_linear(
        self, node: Node, form: LinearForm, index: Mapping[Node, int], inputs: Sequence[Any]
    ) -> None:
        weight = None if form.placeholder is None else inputs[index[form.placeholder]]
        is_parameter = isinstance(weight, nn.Parameter)
        if not is_parameter and node.target is not nn.functional.linear:
            return  # a product of two activations
        value = weight if weight is not None else form.weight.meta["example_value"]
        if value.ndim != 2:
            return
        rows, columns = value.shape
        path = self._path(node, form.placeholder, weight)
        tag = LinearTag(
            fqn=path,
            role=role_of(path),
            block=block_of(path),
            num_blocks=None,
            shape=(columns, rows) if form.transposed else (rows, columns),
        )
        unsupported = form.unsupported or (None if is_parameter else _NO_PARAMETER)
        mark(
            node,
            LinearSite(
                tag=tag,
                x=form.x,
                bias=form.bias,
                weight=index[form.placeholder] if form.placeholder and is_parameter else None,
                transposed=form.transposed,
                dtype=node.meta["example_value"].dtype,
                bytes_dense=rows * columns * value.element_size(),
                unsupported=unsupported,
            ),
        )

    def _mark_experts(self, placeholder: Node, value: object, index: int) -> None:
        if not isinstance(value, nn.Parameter) or value.ndim != 3 or not placeholder.users:
            return
        path = self._known(value, "") or _source_path(placeholder)
        if role_of(path) is not Role.EXPERT:
            return
        tag = LinearTag(path, Role.EXPERT, block_of(path), None, tuple(value.shape))
        site = LinearSite(
            tag, 0, None, index, False, value.dtype, value.nbytes, _EXPERTS, reason=_EXPERTS
        )
        mark(next(iter(placeholder.users)), site)

    def _path(self, node: Node, placeholder: Node | None, weight: object) -> str:
        stack = node.meta.get("nn_module_stack")
        own = _ROOT.sub("", next(reversed(stack.values()))[0]) if stack else ""
        known = self._known(weight, own)
        if known or own or placeholder is None:
            return known or own or node.name
        return _source_path(placeholder).removesuffix(".weight")

    def _known(self, weight: object, own: str) -> str:
        """Return the parameter's path in the model that ends like the calling module's own path."""
        names = self.names.get(weight, ()) if isinstance(weight, nn.Parameter) else ()
        if not own:
            return names[0] if names else ""
        return next((name for name in names if f".{name}".endswith(f".{own}")), "")


def parameter_names(model: nn.Module) -> Names:
    """Map each parameter to all module paths that hold it (more than one where tied)."""
    names: MutableMapping[nn.Parameter, tuple[str, ...]] = WeakIdKeyDictionary()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter] = (*names.get(parameter, ()), name.removesuffix(".weight"))
    return names


def model_tags(model: nn.Module) -> tuple[LinearTag, ...]:
    """Tag a model's linears from its modules, without tracing."""
    tags = []
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 and role_of(f"{path}.{name}") is Role.EXPERT:
                tag_path, role, shape = f"{path}.{name}", Role.EXPERT, tuple(weight.shape)
            elif weight.ndim == 2 and name == "weight" and not isinstance(module, nn.Embedding):
                stored_KN = type(module).__name__ == "Conv1D"
                tag_path, role = path, role_of(path)
                shape = tuple(weight.T.shape if stored_KN else weight.shape)
            else:
                continue
            tags.append(LinearTag(tag_path, role, block_of(tag_path), None, shape))
    blocks = [tag.block for tag in tags if tag.block is not None]
    total = max(blocks) + 1 if blocks else None
    return tuple(replace(tag, num_blocks=total) for tag in tags)


def _source_path(placeholder: Node) -> str:
    """Return the module path that Dynamo noted for a lifted parameter."""
    argument = placeholder.meta.get("grapharg")
    if argument is None:
        return str(placeholder.target)
    return _MEMBER.sub(r"\1", _ROOT.sub("", argument.source.name))
