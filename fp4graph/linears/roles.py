"""Module path to role and block: one data table per architecture family.

A row is `pattern: role`; the pattern is an `fnmatch` pattern on the path below the block
(`self_attn.q_proj` of `model.layers.3.self_attn.q_proj`), on the whole path outside the blocks, or
on the last name alone. Families are tried in order and the first row that matches wins. Only names
that say enough have a row: for all others `graph/roles_by_flow.py` finds the role.

>>> role_of("model.layers.3.self_attn.q_proj"), role_of("transformer.h.11.mlp.c_proj")
(<Role.Q: 'q'>, <Role.DOWN: 'down'>)
>>> role_of("model.layers.0.mlp.gate"), role_of("lm_head")
(<Role.ROUTER: 'router'>, <Role.LM_HEAD: 'lm_head'>)
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import cache

from fp4graph.linears.stacks import NO_LISTS, Lists, below_block, block_of, stack_of
from fp4graph.linears.tags import LinearTag, Role

FAMILIES: dict[str, dict[str, Role]] = {
    # LoRA adapters of peft: never part of a group, reached by `path:` alone
    "peft": {
        "*.lora_[AB].*": Role.ADAPTER,
        "*.lora_embedding_[AB].*": Role.ADAPTER,
        "*adapter_list.*": Role.ADAPTER,  # Zamba2's own
    },
    # before all others, for a router's `gate` is no gate, and experts have linears of every name
    "mixture of experts": {
        "*router": Role.ROUTER,
        "*router.*": Role.ROUTER,
        "*shared_expert_gate": Role.ROUTER,
        "*gate.wg": Role.ROUTER,
        "*mlp.gate": Role.ROUTER,
        "*moe.gate": Role.ROUTER,
        "*experts": Role.EXPERT,
        "*experts.*": Role.EXPERT,
    },
    "sparse attention": {
        "*indexer.*": Role.INDEXER,
    },
    # names that mean one thing wherever they stand
    "llama and its kin": {
        "q_proj": Role.Q,
        "k_proj": Role.K,
        "v_proj": Role.V,
        "o_proj": Role.O,
        "qkv_proj": Role.QKV,
        "kv_proj": Role.KV,
        "query_key_value": Role.QKV,
        "gate_proj": Role.GATE,
        "up_proj": Role.UP,
        "gate_up_proj": Role.GATE_UP,
        "down_proj": Role.DOWN,
        "*lm_head": Role.LM_HEAD,
        "*lm_heads.*": Role.LM_HEAD,
        "lm_head.decoder": Role.LM_HEAD,
        "*predictions.decoder": Role.LM_HEAD,
        "embed_out": Role.LM_HEAD,
        "output_projection": Role.LM_HEAD,
    },
    "latent attention": {
        "q_a_proj": Role.Q_A,
        "q_b_proj": Role.Q_B,
        "kv_a_proj_with_mqa": Role.KV_A,
        "kv_b_proj": Role.KV_B,
        "o_a_proj": Role.O,
        "o_b_proj": Role.O,
    },
    # hyper-connections, AltUp, LAuReL: they mix residual streams
    "residual": {
        "*_hc.*": Role.RESIDUAL,
        "*hyper_connection.*": Role.RESIDUAL,
        "altup.*": Role.RESIDUAL,
        "laurel.*": Role.RESIDUAL,
        "linear": Role.RESIDUAL,  # Zamba2's, from the shared block back into the stream
    },
    "gemma 3n and 4": {
        "per_layer_input_gate": Role.PER_LAYER,
        "per_layer_projection": Role.PER_LAYER,
    },
    "relative positions and sinks": {
        "*attn.r_proj": Role.POSITION,
        "*rel_logits_proj.*": Role.POSITION,
        "*attn.relative_pos_embeddings": Role.POSITION,
        "*attn.sink_proj": Role.ATTN_GATE,
    },
    "gpt2": {
        "attn.c_attn": Role.QKV,
        "attn.c_proj": Role.O,
        "mlp.c_fc": Role.UP,
        "mlp.c_proj": Role.DOWN,
    },
    "mamba and linear attention": {
        "*mixer.in_proj*": Role.IN_PROJ,
        "*mamba.in_proj*": Role.IN_PROJ,
        "*linear_attn.in_proj*": Role.IN_PROJ,
        "*conv.in_proj": Role.IN_PROJ,
        "x_proj": Role.X_PROJ,
        "dt_proj": Role.DT_PROJ,
        "*mixer.out_proj": Role.OUT_PROJ,
        "*mamba.out_proj": Role.OUT_PROJ,
        "*linear_attn.out_proj": Role.OUT_PROJ,
        "*conv.out_proj": Role.OUT_PROJ,
        "*linear_attn.[ab]_proj": Role.IN_PROJ,
        "self_attn.b_proj": Role.IN_PROJ,
        "self_attn.forget_gate.*": Role.IN_PROJ,
        "temporal_block.linear_[xy]": Role.IN_PROJ,
        "temporal_block.linear_out": Role.OUT_PROJ,
        "mlstm_layer.out_proj": Role.OUT_PROJ,
        "mlstm_layer.*": Role.IN_PROJ,
        "*attn.g_proj": Role.ATTN_GATE,
        "*attn.g_[ab]_proj": Role.ATTN_GATE,
        "*attn.output_gate": Role.ATTN_GATE,
        "attention.value": Role.V,  # RWKV, whose keys and receptance the flow finds
        "feed_forward.receptance": Role.GATE,
    },
    "bert": {
        "*self_attention.query": Role.Q,
        "*self_attention.key": Role.K,
        "*self_attention.value": Role.V,
        "*attention.output.dense": Role.O,
        "intermediate.dense": Role.UP,
        "output.dense": Role.DOWN,
    },
    "opt, bart, torch's own": {
        "*attn.in_proj_weight": Role.QKV,
        "*attn.query_proj": Role.Q,
        "*attn.key_proj": Role.K,
        "*attn.value_proj": Role.V,
        "*attn.qkv": Role.QKV,
        "*attention.query_key": Role.QK,
        "*attn.proj": Role.O,
        "*attn.out_proj": Role.O,
        "fc1": Role.UP,
        "fc2": Role.DOWN,
        "mlp.lin1": Role.UP,
        "mlp.lin2": Role.DOWN,
        "linear1": Role.UP,
        "linear2": Role.DOWN,
    },
    "gpt-neox, falcon, bloom": {
        "attention.dense": Role.O,
        "self_attention.dense": Role.O,
        "mlp.dense_h_to_4h": Role.UP,
        "mlp.dense_4h_to_h": Role.DOWN,
    },
}

_SHARED = re.compile(r"(?:^|\.)shared_(?:experts?|mlp|moe)(?=\.)")
_EXPERT_LINEARS = {  # which linear of an expert a last name means
    "gate_proj": Role.GATE,
    "w1": Role.GATE,
    "up_proj": Role.UP,
    "v1": Role.UP,
    "w3": Role.UP,
    "gate_up_proj": Role.GATE_UP,
    "down_proj": Role.DOWN,
    "w2": Role.DOWN,
}


def role_of(fqn: str, lists: Lists = NO_LISTS) -> Role:
    """Return the role that the tables give to a module path, `Role.OTHER` if none knows it.

    Args:
        fqn: the path.
        lists: of the model's blocks, beside those that their names tell.
    """
    fqn = fqn.removesuffix(".base_layer")  # peft keeps the dense linear under its own name
    fqn = _SHARED.sub("", fqn)  # a shared expert is a dense MLP
    if "." in below_block(fqn, lists):
        fqn = fqn.removesuffix(".linear")  # a wrapper's own, as Moshi's `q_proj.linear`
    return _role(below_block(fqn, lists), fqn.rpartition(".")[2])


@cache
def _role(*names: str) -> Role:
    for table in FAMILIES.values():
        for pattern, role in table.items():
            if any(fnmatchcase(name, pattern) for name in names):
                return role
    return Role.OTHER


def tag_by_name(fqn: str, shape: tuple[int, ...], lists: Lists = NO_LISTS) -> LinearTag:
    """Build the tag that a module path alone tells, of a model whose number of blocks is open."""
    role = role_of(fqn, lists)
    why = "" if role is Role.OTHER else "its name"
    expert = _EXPERT_LINEARS.get(fqn.rpartition(".")[2]) if role is Role.EXPERT else None
    block, stack = block_of(fqn, lists), stack_of(fqn, lists)
    return LinearTag(fqn, role, block, None, shape, why, expert, stack)
