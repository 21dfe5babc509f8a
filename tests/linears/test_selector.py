"""The selector: text to meaning, meaning to canonical text, and errors that point."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4graph.errors import SelectorError
from fp4graph.linears.selector import parse
from fp4graph.linears.selector_ast import NAMES
from fp4graph.linears.tags import LinearTag, Role

BLOCKS = 6
SHAPES = {Role.Q: (64, 64), Role.K: (16, 64), Role.V: (16, 64), Role.O: (64, 64),
          Role.GATE: (256, 64), Role.UP: (256, 64), Role.DOWN: (64, 256)}  # fmt: skip
PARENT = {
    role: "mlp" if role in (Role.GATE, Role.UP, Role.DOWN) else "self_attn" for role in SHAPES
}


def tag(role: Role, block: int | None, fqn: str | None = None) -> LinearTag:
    where = fqn or f"model.layers.{block}.{PARENT.get(role, 'x')}.{role}_proj"
    return LinearTag(where, role, block, BLOCKS, SHAPES.get(role, (1000, 64)))


MODEL = [
    *(tag(role, block) for block in range(BLOCKS) for role in SHAPES),
    tag(Role.LM_HEAD, None, "lm_head"),
    tag(Role.ROUTER, 5, "model.layers.5.mlp.gate"),
]
FUSED = [
    LinearTag(f"model.layers.{b}.{name}", role, b, 2, (96, 64))
    for b in range(2)
    for name, role in (("qkv_proj", Role.QKV), ("o_proj", Role.O), ("gate_up", Role.GATE_UP))
]


def picked(text: str) -> set[str]:
    selector = parse(text)
    return {
        "head" if t.role is Role.LM_HEAD else "router" if t.role is Role.ROUTER
        else f"{t.role}{t.block}"
        for t in MODEL if selector.matches(t)
    }  # fmt: skip


def cross(roles: str, blocks: object) -> set[str]:
    return {f"{role}{block}" for role in roles.split() for block in blocks}  # type: ignore[attr-defined]


ALL, ATTN, MLP = "q k v o gate up down", "q k v o", "gate up down"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("q", cross("q", range(6))),
        ("q,k", cross("q k", range(6))),
        ("attn", cross(ATTN, range(6))),
        ("mlp", cross(MLP, range(6))),
        ("all", cross(ALL, range(6))),
        ("none", set()),
        ("lm_head", {"head"}),
        ("router", {"router"}),
        ("attn,blocks>4", cross(ATTN, [5])),
        ("blocks>4", cross(ALL, [5])),
        ("blocks>=4", cross(ALL, [4, 5])),
        ("blocks<1", cross(ALL, [0])),
        ("blocks<=1", cross(ALL, [0, 1])),
        ("blocks=3", cross(ALL, [3])),
        ("blocks=0..3", cross(ALL, range(4))),
        ("blocks=-1", cross(ALL, [5])),
        ("blocks=-2..-1", cross(ALL, [4, 5])),
        ("blocks=4..-1", cross(ALL, [4, 5])),
        ("blocks<-4", cross(ALL, [0, 1])),
        ("blocks%2=0", cross(ALL, [0, 2, 4])),
        ("blocks>4,blocks<8", cross(ALL, [5])),
        ("q,blocks>0,blocks<2", {"q1"}),
        ("path:*.mlp.*", cross(MLP, range(6)) | {"router"}),
        ("path:*.mlp.*,blocks=5", cross(MLP, [5]) | {"router"}),
        ("path:lm_head", {"head"}),
        ("size>10K", cross(MLP, range(6))),
        ("size<=1.024K", cross("k v", range(6))),
        ("size<2K,q", set()),
        ("!v", cross("q k o gate up down", range(6))),
        ("attn,!v", cross("q k o", range(6))),
        ("attn,!blocks<4", cross(ATTN, [4, 5])),
        ("!(q,k),blocks=0", cross("v o gate up down", [0])),
        ("q | mlp,blocks=0", cross("q", range(6)) | cross(MLP, [0])),
        ("all | lm_head", cross(ALL, range(6)) | {"head"}),
        ("attn & blocks<1", cross(ATTN, [0])),
        ("attn & (q | up)", cross("q", range(6))),
        ("(attn | lm_head) & !q", cross("k v o", range(6))),
        ("(q,k),v,blocks=1", cross("q k v", [1])),
        ("q,(blocks=1)", cross("q", range(6)) | cross(ALL, [1])),
        (" q ,\tk\n", cross("q k", range(6))),
    ],
)
def test_means(text: str, expected: set[str]) -> None:
    assert picked(text) == expected
    again = parse(str(parse(text)))
    assert again == parse(text)
    assert str(again) == str(parse(text))


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("k,q,q", "q,k"),
        ("blocks>4,attn", "attn,blocks>4"),
        ("((q))", "q"),
        ("(q,k),v", "q,k,v"),
        ("!(k,q),all", "all,!q,!k"),
        ("blocks=3..3", "blocks=3"),
        ("size>1000K", "size>1M"),
        ("size>7B", "size>7B"),
        ("v|q", "q | v"),
        ("(q|k)|(q)", "k | q"),
        ("(q|k)&attn", "attn & (k | q)"),
        ("path:b,path:a,q", "q,path:a,path:b"),
    ],
)
def test_canonical(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical


@pytest.mark.parametrize(
    "text, column, words",
    [
        ("atn", 1, "did you mean 'attn'"),
        ("attn,Q", 6, "did you mean 'q'"),
        ("", 1, "empty"),
        ("   ", 1, "empty"),
        ("q &", 4, "expected a role"),
        ("q,,k", 3, "unexpected ','"),
        ("q k", 3, "unexpected 'k'"),
        ("q)", 2, "expected the end"),
        ("(q", 3, "expected `)`"),
        ("!!q", 2, "unexpected '!'"),
        ("blocks", 7, "expected"),
        ("blocks>", 8, "whole number"),
        ("blocks>x", 8, "unexpected 'x'"),
        ("blocks>1.5", 9, "unexpected '.'"),
        ("q, blocks=5..2", 4, "empty"),
        ("blocks%0=1", 1, "never holds"),
        ("blocks%2=2", 1, "never holds"),
        ("size=3", 5, "unexpected '='"),
        ("size>1T", 7, "unexpected 'T'"),
        ("path:", 1, "needs a pattern"),
        ("foo:bar", 1, "unknown prefix 'foo'"),
        ("q # no", 3, "unexpected '#'"),
    ],
)
def test_rejects_with_column(text: str, column: int, words: str) -> None:
    with pytest.raises(SelectorError) as caught:
        parse(text)
    assert caught.value.column == column
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, column, words",
    [
        ("blocks>99", 1, "blocks 0..5"),
        ("q, blocks=-7", 4, "matches nothing"),
        ("q,expert", 3, "`expert` matches nothing"),
        ("attn,!qkv", 7, "`qkv` matches nothing"),
        ("path:*.none.*", 1, "matches nothing"),
        ("size>1B", 1, "matches nothing"),
        ("q & k", None, "together they select nothing"),
        ("q,!q", None, "together they select nothing"),
    ],
)
def test_a_term_that_matches_nothing_raises(text: str, column: int | None, words: str) -> None:
    with pytest.raises(SelectorError) as caught:
        parse(text).check(MODEL)
    assert caught.value.column == column
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["none", "all", "q,blocks>2", "none,q", "!v", "lm_head | router"])
def test_check_accepts(text: str) -> None:
    parse(text).check(MODEL)


@pytest.mark.parametrize("text", ["qkv", "q,k,v", "attn", "all", "!o", "gate_up", "gate,up", "mlp"])
def test_a_fused_weight_is_picked_by_its_name_or_all_its_parts(text: str) -> None:
    assert any(parse(text).matches(t) for t in FUSED if t.role is not Role.O)


@pytest.mark.parametrize(
    "text, column, part", [("q", 1, "q"), ("o,v", 3, "v"), ("all,!k", 6, "q,v"), ("up", 1, "up")]
)
def test_a_part_of_a_fused_weight_is_not_the_weight(text: str, column: int, part: str) -> None:
    parse(text).check(FUSED)  # the graph may show which rows the part has
    with pytest.raises(SelectorError, match="only a part of the fused") as caught:
        [parse(text).matches(tag) for tag in FUSED]
    picked = {each for tag in FUSED for each in parse(text).picks(tag) if len(tag.parts) > 1}
    assert {str(each) for each in picked} >= set(part.split(","))
    assert caught.value.column == column
    assert f"{part} is only" in str(caught.value)


def test_a_negative_block_needs_the_number_of_blocks() -> None:
    fragment = LinearTag("q_proj", Role.Q, 0, None, (8, 8))
    with pytest.raises(SelectorError, match="pass model="):
        parse("blocks=-1").matches(fragment)


names = st.sampled_from(NAMES)
numbers = st.integers(-9, 99)
comparisons = st.one_of(
    st.builds("blocks{}{}".format, st.sampled_from([">", ">=", "<", "<=", "="]), numbers),
    st.builds(lambda a, n: f"blocks={a}..{a + n}", st.integers(0, 9), st.integers(0, 9)),
    st.builds(lambda d, r: f"blocks%{d}={r % d}", st.integers(1, 9), st.integers(0, 9)),
    st.builds("size{}{}{}".format, st.sampled_from([">", "<="]), st.integers(0, 5000),
              st.sampled_from(["", "K", "M", "B"])),
)  # fmt: skip
paths = st.sampled_from(["path:*", "path:*.mlp.*", "path:model.layers.[0-3].*", "path:lm_head"])


def _combine(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = inner.map("({})".format)
    item = st.builds(
        "{}{}".format, st.sampled_from(["", "!"]), st.one_of(names, paths, comparisons, group)
    )
    clause = st.lists(item, min_size=1, max_size=4).map(",".join)
    conj = st.lists(clause, min_size=1, max_size=3).map(" & ".join)
    return st.lists(conj, min_size=1, max_size=3).map("|".join)


texts = st.recursive(names, _combine, max_leaves=12)


@given(texts)
def test_round_trip(text: str) -> None:
    selector = parse(text)
    again = parse(str(selector))
    assert again == selector
    assert hash(again) == hash(selector)
    assert str(again) == str(selector)
    assert [again.matches(t) for t in MODEL] == [selector.matches(t) for t in MODEL]


@given(texts, texts)
def test_set_algebra(a: str, b: str) -> None:
    for t in MODEL:
        in_a, in_b = parse(a).matches(t), parse(b).matches(t)
        assert parse(f"({a}) | ({b})").matches(t) == (in_a or in_b)
        assert parse(f"({a}) & ({b})").matches(t) == (in_a and in_b)
        assert parse(f"all,!({a})").matches(t) == (t.is_block_linear and not in_a)


@given(st.permutations(["q", "up", "blocks>1", "!v", "path:*.mlp.*", "size>1K"]))
def test_order_of_items_does_not_matter(items: list[str]) -> None:
    assert str(parse(",".join(items))) == "q,up,path:*.mlp.*,blocks>1,size>1K,!v"


@given(st.text(max_size=12))
def test_any_text_parses_or_raises_one_line(text: str) -> None:
    with contextlib.suppress(SelectorError):
        parse(text)
        return
    with pytest.raises(SelectorError) as caught:
        parse(text)
    assert len(str(caught.value).splitlines()) == 1
