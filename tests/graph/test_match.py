"""Which nodes are linears: hand-built graphs of a few nodes."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch.nn.functional import linear

from fp4graph.graph.match import match_linear


def build(make: object) -> fx.Node:
    """Build a graph of inputs x, w, b and what `make(g, x, w, b)` adds; return that."""
    g = fx.Graph()
    x, w, b = (g.placeholder(name) for name in "xwb")
    return make(g, x, w, b)  # type: ignore[operator,no-any-return]


def copy(g: fx.Graph, w: fx.Node, method: str, *args: object) -> fx.Node:
    """Add a method call of w with the metadata that Dynamo gives it, float32 before and after."""
    node = g.call_method(method, (w, *args))
    w.meta["example_value"] = node.meta["example_value"] = torch.empty(2, 2)
    return node


ACCEPTED = {
    "linear": (lambda g, x, w, b: g.call_function(linear, (x, w)), False, False),
    "linear with bias": (lambda g, x, w, b: g.call_function(linear, (x, w, b)), False, True),
    "linear with keywords": (
        lambda g, x, w, b: g.call_function(linear, (x,), {"weight": w, "bias": b}), False, True,
    ),
    "linear of nothing but keywords": (
        lambda g, x, w, b: g.call_function(linear, (), {"input": x, "weight": w, "bias": b}),
        False, True,
    ),
    "addmm with keywords": (
        lambda g, x, w, b: g.call_function(torch.addmm, (b,), {"mat2": w, "mat1": x}), True, True,
    ),
    "matmul with a keyword": (
        lambda g, x, w, b: g.call_function(torch.matmul, (x,), {"other": w}), True, False,
    ),
    "b.addmm(x, mat2=w)": (
        lambda g, x, w, b: g.call_method("addmm", (b, x), {"mat2": w}), True, True,
    ),
    "linear of w.detach()": (
        lambda g, x, w, b: g.call_function(linear, (x, copy(g, w, "detach"))), False, False,
    ),
    "linear of w.to(its own dtype)": (
        lambda g, x, w, b: g.call_function(linear, (x, copy(g, w, "to", torch.float32))),
        False, False,
    ),
    "linear of w.data": (
        lambda g, x, w, b: g.call_function(
            linear, (x, g.call_function(torch._C._autograd._get_data_attr, (w,)))
        ),
        False, False,
    ),
    "linear of w.T": (
        lambda g, x, w, b: g.call_function(linear, (x, g.call_function(getattr, (w, "T")))),
        True, False,
    ),
    "addmm": (lambda g, x, w, b: g.call_function(torch.addmm, (b, x, w)), True, True),
    "matmul": (lambda g, x, w, b: g.call_function(torch.matmul, (x, w)), True, False),
    "x @ w.T": (
        lambda g, x, w, b: g.call_function(
            operator.matmul, (x, g.call_function(getattr, (w, "T")))
        ),
        False, False,
    ),
    "x.matmul(w.t())": (
        lambda g, x, w, b: g.call_method("matmul", (x, g.call_method("t", (w,)))), False, False,
    ),
    "transposed twice": (
        lambda g, x, w, b: g.call_function(
            linear, (x, g.call_method("t", (g.call_method("transpose", (w, 0, 1)),)))
        ),
        False, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_recognises(name: str) -> None:
    make, transposed, has_bias = ACCEPTED[name]
    form = match_linear(build(make))
    assert form is not None
    assert form.placeholder is not None
    assert (form.placeholder.name, form.x.name, form.transposed) == ("w", "x", transposed)
    assert (form.bias.name if form.bias else None) == ("b" if has_bias else None)
    assert form.unsupported is None


@pytest.mark.parametrize(
    "make",
    [
        lambda g, x, w, b: g.call_function(torch.add, (x, w)),
        lambda g, x, w, b: g.call_method("relu", (x,)),
        lambda g, x, w, b: g.call_function(torch.matmul, (x, 2)),
    ],
)
def test_ignores(make: object) -> None:
    assert match_linear(build(make)) is None


@pytest.mark.parametrize(
    "make, reason",
    [
        (
            lambda g, x, w, b: g.call_function(linear, (x, g.call_function(torch.neg, (w,)))),
            "computed in the graph",
        ),
        (
            lambda g, x, w, b: g.call_function(torch.addmm, (b, x, w), {"alpha": 2}),
            "alpha or beta",
        ),
        (lambda g, x, w, b: g.call_function(torch.mm, (x, w), {"out": b}), "existing tensor"),
    ],
)
def test_says_why_not(make: object, reason: str) -> None:
    form = match_linear(build(make))
    assert form is not None
    assert form.unsupported is not None
    assert reason in form.unsupported
