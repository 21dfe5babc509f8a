"""Selections rounded to what engines compute as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.models import tiny

from fp4graph import Policy, RefusalError, Scheme, TracedModel
from fp4graph.checkpoints.fused import closed, fused_sets
from fp4graph.errors import OptionError

if TYPE_CHECKING:
    from fp4graph.linears.tags import LinearTag

_TAGS: dict[str, tuple[LinearTag, ...]] = {}


def tags(family: str) -> tuple[LinearTag, ...]:
    if family not in _TAGS:
        traced = TracedModel(tiny(family).requires_grad_(False))
        with torch.no_grad():
            traced(torch.zeros(1, 8, dtype=torch.int64), use_cache=False)
        _TAGS[family] = traced.tags
    return _TAGS[family]


def picked(policy: Policy, family: str) -> set[str]:
    return {tag.fqn for tag in tags(family) if policy.decide(tag).scheme is not None}


def test_the_sets_of_a_llama_and_of_a_mixture() -> None:
    assert {(each.kind, len(each.members)) for each in fused_sets(tags("llama"))} == {
        ("qkv", 3), ("gate_up", 2)
    }  # fmt: skip
    assert len(fused_sets(tags("llama"))) == 4
    (experts, *_) = (each for each in fused_sets(tags("mixtral")) if each.kind == "experts")
    assert [tag.fqn for tag in experts.members] == [
        "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
    ]  # fmt: skip
    assert not fused_sets(tags("gpt2")), "what is one weight already is no set"


@pytest.mark.parametrize(
    "select, up, down",
    [
        ("q", "q,k,v", "none"),
        ("all", "all", "all"),
        ("down | up,blocks=1", "down | gate,up,blocks=1", "down"),
        ("attn | gate", "attn | gate,up", "attn"),
        ("v,blocks=0 | o", "q,k,v,blocks=0 | o", "o"),
    ],
)
def test_rounded_up_and_down(select: str, up: str, down: str) -> None:
    policy = Policy.of(select, Scheme.of())
    for how, expected in (("up", up), ("down", down)):
        found, changed = closed(policy, tags("llama"), how)  # type: ignore[arg-type]
        want = picked(Policy.of(expected, Scheme.of()), "llama")
        assert picked(found, "llama") == want
        assert {tag.fqn for tag in changed} == want ^ picked(policy, "llama")
        assert picked(Policy.of(found.text, Scheme.of()), "llama") == want, "as it prints itself"
        assert closed(found, tags("llama")) == (found, [])


def test_a_cut_is_refused_with_what_would_do() -> None:
    with pytest.raises(RefusalError) as raised:
        closed(Policy.of("q,blocks=1", Scheme.of()), tags("llama"))
    text = str(raised.value)
    assert "model.layers.1.self_attn (q_proj, k_proj, v_proj)" in text
    assert 'up: {"q,blocks=1": "nvfp4", "k,v,blocks=1": "nvfp4"}' in text
    policy = Policy.of({"q": "nvfp4", "k,v": "mxfp4"}, Scheme.of())
    with pytest.raises(OptionError, match="run in several ways"):
        closed(policy, tags("llama"), "up")
    assert not picked(closed(policy, tags("llama"), "down")[0], "llama")


def test_half_a_mixture_is_a_cut() -> None:
    policy = Policy.of("expert:down", Scheme.of())
    found, _ = closed(policy, tags("mixtral"), "up")
    assert picked(found, "mixtral") == picked(Policy.of("expert", Scheme.of()), "mixtral")
