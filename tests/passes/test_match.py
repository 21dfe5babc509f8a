"""Which nodes are linears: hand-built graphs of a few nodes."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch.nn.functional import linear

from fp4graph.passes.match import match_linear


def build(make: object) -> fx.Node:
    """Build a graph of inputs x, w, b and what `make(g, x, w, b)` adds; return that."""
    g = fx.Graph()
    x, w, b = (g.placeholder(name) for name in "xwb")
    return make(g, x, w, b)  # type: ignore[operator,no-any-return]


ACCEPTED = {
    "linear": (lambda g, x, w, b: g.call_function(linear, (x, w)), 0, False, False),
    "linear with bias": (lambda g, x, w, b: g.call_function(linear, (x, w, b)), 0, False, True),
    "linear with keywords": (
        lambda g, x, w, b: g.call_function(linear, (x,), {"weight": w, "bias": b}), 0, False, True,
    ),
    "linear of w.T": (
        lambda g, x, w, b: g.call_function(linear, (x, g.call_function(getattr, (w, "T")))),
        0, True, False,
    ),
    "addmm": (lambda g, x, w, b: g.call_function(torch.addmm, (b, x, w)), 1, True, True),
    "matmul": (lambda g, x, w, b: g.call_function(torch.matmul, (x, w)), 0, True, False),
    "x @ w.T": (
        lambda g, x, w, b: g.call_function(
            operator.matmul, (x, g.call_function(getattr, (w, "T")))
        ),
        0, False, False,
    ),
    "x.matmul(w.t())": (
        lambda g, x, w, b: g.call_method("matmul", (x, g.call_method("t", (w,)))), 0, False, False,
    ),
    "transposed twice": (
        lambda g, x, w, b: g.call_function(
            linear, (x, g.call_method("t", (g.call_method("transpose", (w, 0, 1)),)))
        ),
        0, False, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_recognises(name: str) -> None:
    make, x, transposed, has_bias = ACCEPTED[name]
    form = match_linear(build(make))
    assert form is not None
    assert form.placeholder is not None
    assert (form.placeholder.name, form.x, form.transposed) == ("w", x, transposed)
    assert (form.bias is not None) == has_bias
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
    ],
)
def test_says_why_not(make: object, reason: str) -> None:
    form = match_linear(build(make))
    assert form is not None
    assert form.unsupported is not None
    assert reason in form.unsupported
