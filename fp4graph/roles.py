"""Module path to role and block: one data table per architecture family.

A row is `pattern: role`; the pattern is an `fnmatch` pattern on the path below the block
(`self_attn.q_proj` of `model.layers.3.self_attn.q_proj`), or on the whole path outside the blocks.
Families are tried in order and the first row that matches wins, so a new architecture is a new
table, and only names that mean different things in different families need their order thought of.

>>> role_of("model.layers.3.self_attn.q_proj"), block_of("model.layers.3.self_attn.q_proj")
(<Role.Q: 'q'>, 3)
>>> role_of("transformer.h.11.mlp.c_proj"), block_of("transformer.h.11.mlp.c_proj")
(<Role.DOWN: 'down'>, 11)
>>> role_of("model.layers.0.mlp.gate"), role_of("lm_head"), block_of("lm_head")
(<Role.ROUTER: 'router'>, <Role.LM_HEAD: 'lm_head'>, None)
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import cache

from fp4graph.tags import Role

FAMILIES: dict[str, dict[str, Role]] = {
    # LoRA adapters of peft: never part of a group, reached by `path:` alone
    "peft": {
        "*.lora_[AB].*": Role.ADAPTER,
        "*.lora_embedding_[AB].*": Role.ADAPTER,
    },
    # Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss: before the dense tables, for `gate` is a router here
    "mixture of experts": {
        "mlp.gate": Role.ROUTER,
        "mlp.router": Role.ROUTER,
        "block_sparse_moe.gate": Role.ROUTER,
        "mlp.shared_expert_gate": Role.ROUTER,
        "*experts": Role.EXPERT,
        "*experts.*": Role.EXPERT,
    },
    # Llama, Mistral, Qwen2, Qwen2.5, Qwen3, Gemma, Gemma2, Gemma3; Qwen2-MoE's shared expert
    "llama": {
        "self_attn.q_proj": Role.Q,
        "self_attn.k_proj": Role.K,
        "self_attn.v_proj": Role.V,
        "self_attn.o_proj": Role.O,
        "mlp.gate_proj": Role.GATE,
        "mlp.up_proj": Role.UP,
        "mlp.down_proj": Role.DOWN,
        "mlp.shared_expert.gate_proj": Role.GATE,
        "mlp.shared_expert.up_proj": Role.UP,
        "mlp.shared_expert.down_proj": Role.DOWN,
        "lm_head": Role.LM_HEAD,
    },
    "phi3": {
        "self_attn.qkv_proj": Role.QKV,
        "mlp.gate_up_proj": Role.GATE_UP,
    },
    "gpt2": {
        "attn.c_attn": Role.QKV,
        "attn.c_proj": Role.O,
        "mlp.c_fc": Role.UP,
        "mlp.c_proj": Role.DOWN,
    },
    "opt": {
        "self_attn.out_proj": Role.O,
        "fc1": Role.UP,
        "fc2": Role.DOWN,
    },
    "gpt-neox": {
        "attention.query_key_value": Role.QKV,
        "attention.dense": Role.O,
        "mlp.dense_h_to_4h": Role.UP,
        "mlp.dense_4h_to_h": Role.DOWN,
        "embed_out": Role.LM_HEAD,
    },
    "falcon, bloom": {
        "self_attention.query_key_value": Role.QKV,
        "self_attention.dense": Role.O,
    },
}

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)(?:\.|$)")
_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def block_of(fqn: str) -> int | None:
    """Return the block index in a module path, or None outside the blocks."""
    found = _BLOCK.search(fqn) or _INDEX.search(fqn)
    return int(found.group(1)) if found else None


@cache
def role_of(fqn: str) -> Role:
    """Return the role that the tables give to a module path, `Role.OTHER` if none knows it."""
    fqn = fqn.removesuffix(".base_layer")  # peft keeps the dense linear under its own name
    found = _BLOCK.search(fqn) or _INDEX.search(fqn)
    names = (fqn[found.end() :],) if found else (fqn, fqn.rpartition(".")[2])
    for table in FAMILIES.values():
        for pattern, role in table.items():
            if any(fnmatchcase(name, pattern) for name in names):
                return role
    return Role.OTHER
