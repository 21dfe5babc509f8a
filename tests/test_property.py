"""Any small model, any selector: the twin with rounded weights, or an error of ours."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.closer import relative_l2
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import fp4graph

if TYPE_CHECKING:
    from torch import Tensor

D = 16
EXAMPLES, LEAST_COMPARED = 60, 20
NAMES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
SPELLINGS = ("module", "linear", "keywords", "addmm", "matmul", "einsum", "detach")
WRAPPERS = ("none", "checkpoint", "region", "cond", "graph break", "disable")
CHANGES = ("none", "input in place", "weight in place", "between calls", "between calls, .data")
SELECTORS = (
    "all", "none", "attn", "mlp", "q", "down", "blocks=0", "blocks>0", "blocks=-1", "attn,blocks=0",
    "!up", "q | mlp,blocks=1", "path:*o_proj", "size>300", "v", "blocks=7",
)  # fmt: skip


class Layer(nn.Module):
    """Four linears, each spelled in its own way."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        super().__init__()
        for name, bias in zip(NAMES, recipe["biases"], strict=True):
            parent, _, child = name.partition(".")
            if not hasattr(self, parent):
                setattr(self, parent, nn.ModuleDict())
            getattr(self, parent)[child] = nn.Linear(D, D, bias)
        self.recipe = recipe

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        y = self.run(0, h)
        if self.recipe["change"] == "input in place":
            h.mul_(-2)
        y = y + self.run(2, h)
        return x + self.run(1, y) + self.run(3, y)

    def run(self, index: int, x: Tensor) -> Tensor:
        module = self.get_submodule(NAMES[index])
        w, b = module.weight, module.bias
        if self.recipe["change"] == "weight in place" and index == 2:
            w.clamp_(-0.2, 0.2)
        match self.recipe["spellings"][index]:
            case "module":
                return module(x)
            case "linear":
                return linear(x, w, b)
            case "keywords":
                return linear(input=x, weight=w, bias=b)
            case "detach":
                return linear(x, w.detach().float(), b)
            case "addmm" if b is not None:
                return torch.addmm(input=b, mat1=x, mat2=w.t())
            case "einsum":
                y = torch.einsum("bi,oi->bo", x, w)
            case _:
                y = torch.matmul(x, other=w.T)
        return y if b is None else y + b


_region = torch.compiler.nested_compile_region(lambda layer, x: layer(x))


class Model(nn.Module):
    def __init__(self, recipe: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(recipe) for _ in range(recipe["blocks"]))
        if recipe["tie"]:
            self.layers[-1].mlp["up_proj"].weight = self.layers[0].mlp["up_proj"].weight
        self.recipe = recipe

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            match self.recipe["wrapper"]:
                case "checkpoint":
                    x = checkpoint(layer, x, use_reentrant=False)
                case "region":
                    x = _region(layer, x)
                case "cond":
                    x = torch.cond(x.sum() > 0, layer, layer, (x,))
                case "graph break":
                    x = layer(x)
                    torch._dynamo.graph_break()
                case "disable":
                    x = torch._dynamo.disable(layer)(x)
                case _:
                    x = layer(x)
        return x


recipes = st.fixed_dictionaries(
    {
        "blocks": st.integers(1, 3),
        "biases": st.tuples(*[st.booleans()] * 4),
        "spellings": st.tuples(*[st.sampled_from(SPELLINGS)] * 4),
        "wrapper": st.sampled_from(WRAPPERS),
        "change": st.sampled_from(CHANGES),
        "tie": st.booleans(),
        "select": st.sampled_from(SELECTORS),
        "format": st.sampled_from(["nvfp4", "mxfp4"]),
        "with_model": st.booleans(),
    }
)


def twin(model: Model, backend: Any, x: Tensor) -> Tensor:
    """Run a copy whose selected weights are rounded, as eager PyTorch runs it."""
    ((selector, scheme),) = backend.policy.entries
    assert scheme is not None
    copied = copy.deepcopy(model)
    up = copied.layers[-1].mlp["up_proj"]
    up.weight = nn.Parameter(up.weight.clone(), requires_grad=False)  # each use is selected apart
    for linear_ in fp4graph.graph.names.named_linears(copied):
        if selector.matches(linear_.tag):
            w = linear_.weight
            w.copy_(fp4graph.quantize(w, scheme.format).dequantize())
    for layer in copied.layers:
        x = layer(x)
    return x


def outcome(recipe: dict[str, Any]) -> str:
    """Compare a model with its twin, call by call; say how far that went."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Model(recipe).requires_grad_(False), torch.randn(3, D)
    backend = fp4graph.backend(
        recipe["select"],
        format=recipe["format"],
        inner="eager",
        model=model if recipe["with_model"] else None,
    )
    call = torch.compile(model, backend=backend)
    for _ in range(2):
        expected = twin(model, backend, x)
        try:
            out = call(x)
        except fp4graph.Fp4GraphError:
            return "refused"
        except Exception:
            torch._dynamo.reset()
            with pytest.raises(Exception):  # noqa: B017, PT011 - Dynamo cannot do it alone either
                torch.compile(copy.deepcopy(model), backend="eager")(x)
            return "not for Dynamo"
        assert relative_l2(out, expected) < 1e-5
        weight = model.layers[0].self_attn["q_proj"].weight
        if recipe["change"] == "between calls":
            weight.mul_(1.5)
        elif recipe["change"] == "between calls, .data":
            weight.data.mul_(1.5)
    in_fp4 = any(row.selected for row in backend.report)
    return "compared in FP4" if in_fp4 else "compared dense"


@torch.no_grad()
def test_the_twin_or_an_error_of_ours() -> None:
    found: Counter[tuple[str, str]] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(recipe=recipes)
    def run(recipe: dict[str, Any]) -> None:
        found[outcome(recipe), recipe["wrapper"]] += 1

    run()
    compared = Counter(wrapper for how, wrapper in found.elements() if how == "compared in FP4")
    assert sum(compared.values()) >= LEAST_COMPARED, found
    assert set(compared) == set(WRAPPERS) - {"disable"}, found  # no graph has what is disabled
