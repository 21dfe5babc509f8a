"""Roles of linears from what their results flow into: names are not asked.

q, k, v      what reaches attention's three arguments; all three, or two: qkv, kv
q_a -> q_b   a linear that reaches another through no more than a norm: a low-rank chain,
kv_a -> kv_b the same
o            takes the result of attention; attn_gate: an activated factor of what it takes
gate, up     the two factors of what `down` takes, of which gate passed an activation;
up alone where there is one; gate_up where one linear is both
router       meets top-k
lm_head      gives what the graph returns, a row for each of the embedding's

Attention over several streams at once, whose q, k and v are put one after the other, has a linear
of each kind for every stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import Node

from fp4graph.graph.flow import SOFTMAX, TOP, Flow, tensors
from fp4graph.graph.match import called
from fp4graph.graph.site import site_of
from fp4graph.linears.tags import Role

if TYPE_CHECKING:
    from collections.abc import Collection


_PRODUCTS = {"mul", "multiply", "mul_", "imul", "addcmul"}
_Found = Iterator[tuple[Node, Role, str]]
_MOST_PROJECTIONS = 5


def roles_by_dataflow(
    flow: Flow,
) -> dict[Node, tuple[Role, str]]:
    """Return the role of each linear that a rule knows, and the rule."""
    found: dict[Node, tuple[Role, str]] = {}
    for rule in (_attention, _mlp, _router, _head):
        for node, role, why in rule(flow):
            found.setdefault(node, (role, why))
    return found


def _attention(flow: Flow) -> _Found:
    for result, arguments in flow.attentions:
        reached = _reached(flow, arguments)
        if len(reached) > _MOST_PROJECTIONS * _streams(flow, arguments):
            continue  # the walk went astray
        chains = {
            below: above
            for above in reached
            if flow.is_plain(flow.linears[above])
            for below in flow.linears_of(flow.linears[above])
        }
        for linear, parts in reached.items():
            role = _PARTS.get(("".join(sorted(parts)), linear in chains.values()))
            if role is not None and linear not in chains:
                yield linear, role, f"reaches attention's {', '.join(sorted(parts))}"
        for below, above in chains.items():
            parts = reached[above] | reached.get(below, set())
            role = Role.Q_A if parts == {"q"} else Role.KV_A
            yield below, role, "the first of a low-rank chain into attention"
        yield from _after_attention(flow, result, reached)


def _reached(flow: Flow, arguments: tuple[Node, Node, Node]) -> dict[Node, set[str]]:
    """Return the linears that reach attention, and which of its arguments, by letter."""
    reached: dict[Node, set[str]] = {}
    for part, argument in zip("qkv", arguments, strict=True):
        for linear, origins in flow.linears_of(argument).items():
            if not all(origin.activated for origin in origins):
                reached.setdefault(linear, set()).add(part)
    return reached


def _streams(flow: Flow, arguments: tuple[Node, Node, Node]) -> int:
    """Return how many sequences are put one after the other before attention, each its linears'."""
    waiting, seen, most = list(arguments), set[Node](), 1
    while waiting:
        node = waiting.pop()
        if node in seen or node in flow.linears:
            continue
        seen.add(node)
        waiting += tensors(node)
        if called(node) in ("cat", "concat", "concatenate"):
            pieces = [set(flow.linears_of(each)) for each in tensors(node)]
            apart = len(set[Node]().union(*pieces)) == sum(map(len, pieces))
            most = max(most, len(pieces) if all(pieces) and apart else 1)
    return most


def _after_attention(flow: Flow, result: Node, reached: Collection[Node]) -> _Found:
    for linear, x in flow.linears.items():
        if not any(origin.node is result for origin in flow[x]):
            continue
        yield linear, Role.O, "takes attention's result"
        for factor, origins in flow.linears_of(x).items():
            if factor in reached or not all(origin.activated for origin in origins):
                continue
            if _multiplied(flow, x, result, factor):
                yield factor, Role.ATTN_GATE, "an activated factor of attention's result"
            else:
                yield factor, Role.UP, "passes an activation beside attention's result"


def _multiplied(flow: Flow, x: Node, result: Node, factor: Node) -> bool:
    """Whether a linear's result multiplies attention's on the way to `x`."""
    waiting, seen = [x], set[Node]()
    while waiting:
        node = waiting.pop()
        if node in seen or node in flow.linears or node is result:
            continue
        seen.add(node)
        inputs = tensors(node)
        waiting += inputs
        if called(node) in _PRODUCTS and len(inputs) > 1:
            origins = [{origin.node for origin in flow[each]} for each in inputs]
            if any(result in each for each in origins) and any(factor in each for each in origins):
                return True
    return False


_PARTS = {
    ("q", False): Role.Q,
    ("k", False): Role.K,
    ("v", False): Role.V,
    ("kqv", False): Role.QKV,
    ("kq", False): Role.QK,
    ("kv", False): Role.KV,
    ("q", True): Role.Q_B,
    ("k", True): Role.K,
    ("v", True): Role.V,
    ("kv", True): Role.KV_B,
}


def _mlp(flow: Flow) -> _Found:
    for down, x in flow.linears.items():
        if not flow.is_plain(x):
            continue
        factors = flow.linears_of(x)
        if any(_block(factor) != _block(down) for factor in factors):
            continue  # what conditions all blocks alike, such as a time embedding
        activated = [n for n, all_ in factors.items() if any(each.activated for each in all_)]
        if len(factors) == 1 and activated:
            (only, origins), why = next(iter(factors.items())), "passes an activation into down"
            both = {origin.activated for origin in origins} == {True, False}
            if both and all(origin.cut for origin in origins):
                yield only, Role.GATE_UP, "cut in two factors of what down takes"
            else:
                yield only, Role.UP, why
            yield down, Role.DOWN, "takes an activated linear's result"
        elif len(factors) == 2 and len(activated) == 1:
            other = next(each for each in factors if each is not activated[0])
            yield activated[0], Role.GATE, "passes an activation, then multiplies"
            yield other, Role.UP, "is multiplied by an activated linear"
            yield down, Role.DOWN, "takes the product of gate and up"


def _block(linear: Node) -> tuple[str, int | None] | None:
    site = site_of(linear)
    return None if site is None else (site.tag.stack, site.tag.block)


def _router(flow: Flow) -> _Found:
    for node in flow.nodes:
        inputs = tensors(node)
        if called(node) != "topk" or not inputs:
            continue
        values = [inputs[0]]
        for origin in flow[inputs[0]]:
            if called(origin.node) in SOFTMAX:
                values += tensors(origin.node)[:1]
        for value in values:
            linears = flow.linears_of(value)
            rest = {origin.node for origin in flow[value]} - set(linears)
            if all(called(each) in TOP for each in rest):  # groups are chosen first
                for linear in linears:
                    yield linear, Role.ROUTER, "meets top-k"


def _head(flow: Flow) -> _Found:
    embeddings = (node for node in flow.nodes if called(node) == "embedding")
    rows = {_rows(node) for node in embeddings if _embeds_an_input(node, flow)} - {None}
    for node in flow.linears:
        if node.meta["example_value"].shape[-1] in rows and _is_returned(node, flow):
            yield node, Role.LM_HEAD, "gives the logits, a row for each of the embedding's"


def _embeds_an_input(embedding: Node, flow: Flow) -> bool:
    """Whether what is looked up is given to the graph, and not positions that it counts itself."""
    waiting = [each for each in tensors(embedding) if not _is_table(each)]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder" and not flow.is_parameter(node):
            return True
        waiting += [] if called(node) == "embedding" else tensors(node)
    return False


def _is_table(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.is_floating_point()


def _rows(embedding: Node) -> int | None:
    weight = (*embedding.args, None, None)[1] or embedding.kwargs.get("weight")
    value = weight.meta.get("example_value") if isinstance(weight, Node) else None
    return None if value is None else int(value.shape[0])


def _is_returned(node: Node, flow: Flow) -> bool:
    """Whether a graph returns a linear's result, or what is made of it by no other linear."""
    waiting, seen = [node], set[Node]()
    while waiting:
        each = waiting.pop()
        if each.op == "output":
            return True
        if each not in seen and (each is node or each not in flow.linears):
            seen.add(each)
            waiting += each.users
    return False
