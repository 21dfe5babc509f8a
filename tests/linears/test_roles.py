"""Every family: all block linears tagged, completely and rightly."""

from __future__ import annotations

from collections import Counter

import pytest
from support.models import BLOCK_LINEARS, BLOCKS, DENSE, FAMILIES, tiny, tokens

import fp4graph
from fp4graph.graph.names import named_linears
from fp4graph.linears.roles import role_of
from fp4graph.linears.stacks import block_of
from fp4graph.linears.tags import Role

ROUTERS = {"mixtral": 1, "qwen2_moe": 2, "qwen3_moe": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_tags_every_linear_of_the_family(family: str) -> None:
    model = tiny(family)
    report = fp4graph.explain(model, tokens(), select="all", use_cache=False)
    modules = {each.tag.fqn: each.tag for each in named_linears(model)}
    for row in report:
        tag = modules[row.path]
        assert (str(tag.role), tag.block, tag.shape) == (row.role, row.block, row.shape)
        assert tag.num_blocks == BLOCKS
    assert set(modules) == {row.path for row in report}, "modules tell what the graph tells"
    for block in range(BLOCKS):
        rows = [row for row in report if row.block == block]
        roles = Counter(row.role for row in rows)
        routers = ROUTERS.get(family, 0)
        experts = 2 if routers else 0
        expected = Counter(BLOCK_LINEARS.get(family, DENSE))
        assert roles == +(expected + Counter(router=routers, expert=experts))
        assert sorted(row.role for row in rows if row.selected) == sorted(expected.elements())
        for row in rows:
            if row.role == "expert":
                assert row.reason == "not selected"
                assert len(row.shape) == 3
                assert row.expert == row.path.rpartition(".")[2].removesuffix("_proj")
    assert [row.role for row in report if row.block is None] == ["lm_head"]


@pytest.mark.parametrize(
    "path, role, block",
    [
        ("base_model.model.model.layers.7.self_attn.q_proj.base_layer", Role.Q, 7),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.default", Role.ADAPTER, 7),
        ("model.layers.0.mlp.shared_expert.gate_proj", Role.GATE, 0),
        ("model.layers.0.mlp.shared_expert_gate", Role.ROUTER, 0),
        ("model.layers.0.mlp.experts.gate_up_proj", Role.EXPERT, 0),
        ("model.layers.0.mlp.router", Role.ROUTER, 0),
        ("transformer.h.0.mystery", Role.OTHER, 0),
        ("decoder.layers.3.self_attn.q_proj.linear", Role.Q, 3),
        ("model.layers.3.linear", Role.RESIDUAL, 3),
        ("score", Role.OTHER, None),
        ("embed_out", Role.LM_HEAD, None),
        ("self_attn.q_proj", Role.Q, None),
    ],
)
def test_paths(path: str, role: Role, block: int | None) -> None:
    assert (role_of(path), block_of(path)) == (role, block)


def test_an_adapter_is_in_no_group() -> None:
    tag = fp4graph.Selector("all | attn | mlp")
    adapter = "model.layers.7.self_attn.q_proj.lora_A.default"
    made = [t for t in (_tag(adapter),) if tag.matches(t)]
    assert made == []


def _tag(path: str) -> fp4graph.linears.tags.LinearTag:
    return fp4graph.linears.tags.LinearTag(path, role_of(path), block_of(path), 8, (8, 8))
