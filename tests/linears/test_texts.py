"""Selectors for sets of linears pick these and no others."""

from __future__ import annotations

from fp4graph.linears.selector import parse
from fp4graph.linears.tags import LinearTag as Tag
from fp4graph.linears.tags import Role
from fp4graph.linears.texts import selectors_for


def test_selectors_pick_what_they_shall_and_no_more() -> None:
    def tag(path: str, role: str, block: int | None, stack: str = "text") -> Tag:
        return Tag(path, Role(role), block, 2, (8, 8), stack=stack, main=stack == "text")

    every = [
        tag("a.0.self.q", "q", 0), tag("a.0.cross.q", "q", 0), tag("a.1.self.q", "q", 1),
        tag("v.0.q", "q", 0, "vision"), tag("head", "lm_head", None), tag("x", "other", None),
        tag("a.0.k", "k", 0), tag("a.1.k", "k", 1),
    ]  # fmt: skip
    for members in ([every[0]], every[:3], [every[3]], every[4:6], every[5:7], every):
        texts = selectors_for(members, every)
        assert {each for each in every if any(parse(t).picks(each) for t in texts)} == set(members)
    assert selectors_for(every[:3], every) == ["q"]
    assert selectors_for([every[0]], every) == ["path:a.0.self.q"]
    assert selectors_for([every[2], every[7]], every) == ["q,k,blocks=1"]
