"""Graphs as text, as docstrings of passes show them: built from it, compared with it.

    h = norm_weight * x
    q = linear(h, q_weight, None)      # role q; block 7; scheme nvfp4 W4A16

A line assigns one call; calls nest. A name that nothing assigns is a graph input, in what a pass
left also one of its buffers. What follows `#` is the linear's mark, `key value` each; `none` where
it has none. Two graphs are the same if their calls are, in order, whatever their nodes are called.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.nn.functional import linear

from fp4graph import Scheme
from fp4graph.graph.match import match_linear
from fp4graph.graph.site import LinearSite, mark, site_of
from fp4graph.linears.tags import LinearTag, Role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

FUNCTIONS = {"linear": linear}
OPERATORS = {ast.Mult: operator.mul}


@dataclass(frozen=True)
class Case:
    """A pair of a docstring: the title of `Given` is what stands between it and its colon."""

    title: str
    given: str
    result: str


def cases(made: type) -> list[Case]:
    """Return the Given / Result pairs of a class's docstring, in order."""
    lines = (inspect.getdoc(made) or "").splitlines()
    found: list[tuple[str, str, list[str]]] = []
    inside = False
    for line in lines:
        head = re.fullmatch(r"(Given|Result)(?:, )?(.*):", line)
        inside = bool(head) or (inside and (line.startswith("    ") or not line))
        if head:
            found.append((head[1], head[2], []))
        elif inside:
            found[-1][2].append(line.strip())
    blocks = [(kind, title, "\n".join(body)) for kind, title, body in found]
    pairs = zip(blocks[::2], blocks[1::2], strict=True)
    return [Case(title, given, result) for (_, title, given), (_, _, result) in pairs]


@dataclass
class _Line:
    """One call: where its value goes, what is called, with what; names stand for values."""

    target: str
    callee: Any
    method: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    marks: dict[str, str]


@dataclass(frozen=True)
class _Name:
    name: str


@dataclass
class _Parser:
    lines: list[_Line] = field(default_factory=list)

    def read(self, text: str) -> list[_Line]:
        for row in text.splitlines():
            code, _, comment = row.partition("#")
            before = len(self.lines)
            for statement in ast.parse(code.strip()).body:
                assert isinstance(statement, ast.Assign), row
                (target,) = statement.targets
                assert isinstance(target, ast.Name)
                self._value(statement.value, target.id)
            if comment:
                assert before < len(self.lines) or not code.strip()
                self.lines[-1].marks |= _marks(comment)
        return self.lines

    def _value(self, node: ast.expr, target: str = "") -> Any:
        if isinstance(node, ast.Name):
            return _Name(node.id)
        if isinstance(node, ast.Constant | ast.UnaryOp):
            return ast.literal_eval(node)
        if isinstance(node, ast.List | ast.Tuple):
            return [self._value(each) for each in node.elts]
        if isinstance(node, ast.Attribute):
            return _of_torch(node)
        if isinstance(node, ast.Subscript):
            sides = (self._value(node.value), self._value(node.slice))
            return self._call(target, operator.getitem, False, sides, {})
        if isinstance(node, ast.BinOp):
            sides = (self._value(node.left), self._value(node.right))
            return self._call(target, OPERATORS[type(node.op)], False, sides, {})
        return self._called(node, target)

    def _called(self, node: ast.expr, target: str) -> _Name:
        assert isinstance(node, ast.Call), ast.dump(node)
        args = tuple(self._value(each) for each in node.args)
        kwargs = {str(each.arg): self._value(each.value) for each in node.keywords}
        if isinstance(node.func, ast.Name):
            return self._call(target, FUNCTIONS[node.func.id], False, args, kwargs)
        assert isinstance(node.func, ast.Attribute)
        root = node.func.value
        text = ast.unparse(root)
        if text == "fp4graph":
            return self._call(target, node.func.attr, False, args, kwargs)
        if text.partition(".")[0] == "torch":
            return self._call(target, _of_torch(node.func), False, args, kwargs)
        return self._call(target, node.func.attr, True, (self._value(root), *args), kwargs)

    def _call(self, target: str, callee: Any, method: bool, args: Any, kwargs: Any) -> _Name:
        target = target or f"_{len(self.lines)}"
        self.lines.append(_Line(target, callee, method, args, kwargs, {}))
        return _Name(target)


def _of_torch(node: ast.expr) -> Any:
    value: Any = torch
    for part in ast.unparse(node).split(".")[1:]:
        value = getattr(value, part)
    return value


def _marks(comment: str) -> dict[str, str]:
    pairs = (each.strip().partition(" ") for each in comment.split(";"))
    return {key: value for key, _, value in pairs}


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, list | tuple):
        return [_map(each, change) for each in value]
    return change(value)


@dataclass
class Built:
    """A graph with the values of its inputs, and its marked nodes by their names in the text."""

    gm: fx.GraphModule
    inputs: list[Tensor]
    nodes: dict[str, fx.Node]

    def has(self, name: str) -> bool:
        return name in self.nodes

    def value(self, name: str) -> Any:
        return self.nodes[name].meta["example_value"]


def build(text: str, values: Mapping[str, Tensor]) -> Built:
    """Build the graph that a text shows; `values` has its inputs."""
    lines = _Parser().read(text)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    known: dict[str, Any] = {}
    assigned = {line.target for line in lines}
    for line in lines:
        for each in _flat((line.args, line.kwargs.values())):
            if isinstance(each, _Name) and each.name not in assigned | set(nodes):
                nodes[each.name] = graph.placeholder(each.name)
                known[each.name] = values[each.name]
                nodes[each.name].meta["example_value"] = values[each.name]
    inputs = [known[name] for name in nodes]
    for line in lines:

        def node_of(value: Any) -> Any:
            return nodes[value.name] if isinstance(value, _Name) else value

        def value_of(value: Any) -> Any:
            return known[value.name] if isinstance(value, _Name) else value

        args, kwargs = _map(line.args, node_of), _map_values(line.kwargs, node_of)
        callee = line.callee
        if isinstance(callee, str) and not line.method:
            callee = getattr(torch.ops.fp4graph, callee).default
        make = graph.call_method if line.method else graph.call_function
        node = make(callee, tuple(args), kwargs)
        call = getattr(torch.Tensor, callee) if line.method else callee
        value = call(*_map(line.args, value_of), **_map_values(line.kwargs, value_of))
        node.meta["example_value"] = value
        nodes[line.target], known[line.target] = node, value
    graph.output(tuple(node for node in graph.nodes if not node.users and node.op[0] == "c"))
    for line in lines:
        if line.marks:
            mark(nodes[line.target], _site(line, nodes[line.target], list(nodes.values())))
    return Built(fx.GraphModule({}, graph), inputs, nodes)


def _map_values(kwargs: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {key: _map(value, change) for key, value in kwargs.items()}


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        yield value
        return
    for each in value:
        yield from _flat(each)


def _site(line: _Line, node: fx.Node, inputs: Sequence[fx.Node]) -> LinearSite:
    name, marks = line.target, line.marks
    form = match_linear(node)
    assert form is not None
    assert form.placeholder is not None
    weight = form.placeholder.meta["example_value"]
    shape = tuple(weight.shape[:-2]) + tuple(weight.mT.shape if form.transposed else weight.shape)
    block = int(marks.get("block", 0))
    role = Role(marks.get("role", "q"))
    tag = LinearTag(marks.get("path", f"layers.{block}.{name}"), role, block, 12, shape)
    scheme = None
    if "scheme" in marks:
        format, mode, *how = marks["scheme"].replace(",", "").split()
        activations = {"W4A16": "none", "W4A4": "same"}[mode]
        scheme = Scheme.of(format, how[0] if how else "rtn", activations, "reference")
    return LinearSite(
        tag=tag,
        weight=inputs.index(form.placeholder),
        transposed=form.transposed,
        dtype=getattr(torch, marks.get("dtype", "float32")),
        bytes_dense=weight.nbytes,
        unsupported=marks.get("unsupported"),
        scheme=scheme,
        rows=None if "rows" not in marks else _rows(marks["rows"]),
        reason=marks.get("reason", "not selected"),
    )


def _rows(text: str) -> tuple[int, ...]:
    first, last = map(int, text.split(" to "))
    return tuple(range(first, last + 1))


def marks_of(site: LinearSite) -> dict[str, str]:
    """Return a mark as text has it."""
    found = {
        "path": site.tag.fqn,
        "role": str(site.tag.role),
        "block": str(site.tag.block),
        "scheme": site.scheme and str(site.scheme),
        "rows": site.rows and f"{site.rows[0]} to {site.rows[-1]}",
        "reason": site.reason,
        "kernel": site.kernel and site.kernel.name,
        "packed": site.entry and " ".join(str(list(each.shape)) for each in site.entry.tensors),
        "unsupported": site.unsupported,
    }
    return {key: value for key, value in found.items() if value}


def differences(gm: fx.GraphModule, text: str) -> list[str]:
    """Return where a graph is not what a text shows, line by line; empty if it is."""
    lines = _Parser().read(text)
    calls = [node for node in gm.graph.nodes if node.op in ("call_function", "call_method")]
    names: dict[fx.Node, str] = {}
    found = []
    for line, node in zip(lines, calls, strict=False):
        expected = (_name(line.callee), line.args, line.kwargs)
        shown = (_name(node.target), node.args, node.kwargs)
        if expected[0] != shown[0] or not _same((line.args, line.kwargs), shown[1:], names):
            found.append(f"{line.target}: expected {expected}, got {shown}")
        names[node] = line.target
        site = site_of(node)
        marks = {} if site is None else marks_of(site)
        for key, value in line.marks.items():
            if marks.get(key, "none") != value:
                found.append(f"{line.target}: {key} is {marks.get(key)!r}, expected {value!r}")
    if len(lines) != len(calls):
        found.append(f"{len(lines)} calls expected, got {calls}")
    return found


def _same(expected: Any, actual: Any, names: dict[fx.Node, str]) -> bool:
    if isinstance(expected, _Name):
        if not isinstance(actual, fx.Node):
            return False
        if actual not in names and actual.op in ("placeholder", "get_attr"):
            if expected.name in names.values():
                return False
            names[actual] = expected.name
        return names.get(actual) == expected.name
    if isinstance(expected, dict):
        keys = expected.keys() == actual.keys()
        return keys and all(_same(each, actual[key], names) for key, each in expected.items())
    if isinstance(expected, list | tuple):
        if not isinstance(actual, list | tuple) or len(expected) != len(actual):
            return False
        return all(_same(*pair, names) for pair in zip(expected, actual, strict=True))
    return bool(expected == actual and not isinstance(actual, fx.Node))


def _name(callee: Any) -> str:
    if isinstance(callee, torch._ops.OpOverload):
        return callee._schema.name.partition("::")[2]
    return callee if isinstance(callee, str) else callee.__name__
