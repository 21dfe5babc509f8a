"""What a linear is: its role in a transformer block, its block, its shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum


class Role(StrEnum):
    """What a linear does; the value is the name that selectors use."""

    Q = "q"
    K = "k"
    V = "v"
    QKV = "qkv"
    QK = "qk"
    KV = "kv"
    O = "o"  # noqa: E741 - the field's own name
    Q_A = "q_a"
    Q_B = "q_b"
    KV_A = "kv_a"
    KV_B = "kv_b"
    ATTN_GATE = "attn_gate"
    INDEXER = "indexer"
    POSITION = "position"
    GATE = "gate"
    UP = "up"
    GATE_UP = "gate_up"
    DOWN = "down"
    IN_PROJ = "in_proj"
    X_PROJ = "x_proj"
    DT_PROJ = "dt_proj"
    OUT_PROJ = "out_proj"
    PER_LAYER = "per_layer"
    RESIDUAL = "residual"
    LM_HEAD = "lm_head"
    ROUTER = "router"
    EXPERT = "expert"
    ADAPTER = "adapter"
    OTHER = "other"

    @property
    def parts(self) -> tuple[Role, ...]:
        """The roles that one weight serves: three for a fused qkv, itself for a plain role."""
        return _FUSED.get(self, (self,))


_FUSED: dict[Role, tuple[Role, ...]] = {
    Role.QKV: (Role.Q, Role.K, Role.V),
    Role.QK: (Role.Q, Role.K),
    Role.KV: (Role.K, Role.V),
    Role.GATE_UP: (Role.GATE, Role.UP),
}

ROLE_GROUPS: dict[str, frozenset[Role]] = {
    "attn": frozenset(
        {Role.Q, Role.K, Role.V, Role.O, Role.Q_A, Role.Q_B, Role.KV_A, Role.KV_B}
        | {Role.ATTN_GATE, Role.INDEXER, Role.POSITION}
    ),
    "mlp": frozenset({Role.GATE, Role.UP, Role.DOWN}),
    "ssm": frozenset({Role.IN_PROJ, Role.X_PROJ, Role.DT_PROJ, Role.OUT_PROJ}),
}
"""What selectors call several roles by; a fused role is in a group by its parts."""

_NOT_BLOCK_LINEARS = frozenset(
    {Role.LM_HEAD, Role.ROUTER, Role.EXPERT, Role.RESIDUAL, Role.ADAPTER, Role.OTHER}
)


@dataclass(frozen=True, slots=True)
class LinearTag:
    """Who a linear is.

    Invariants: `shape` is (out_features, in_features) however the model stores the weight, with a
    leading number of experts where experts are stacked; `0 <= block < num_blocks` where both are
    known.

    Attributes:
        fqn: module path, `model.layers.3.self_attn.q_proj`.
        role: what the linear does.
        block: index of its transformer block in its stack; None outside the blocks.
        num_blocks: blocks of its stack, which negative indexes count from; None if unknown.
        shape: shape of the weight.
        why: what told the role: a name, or where the result flows; empty where nothing did.
        expert: of an expert, which of its linears: gate, up, gate_up or down; None elsewhere, and
            where nothing tells.
        stack: name of its stack of blocks, see `stacks.py`.
        main: whether that is the language model's or the only one, which selectors mean that name
            none.
    """

    fqn: str
    role: Role
    block: int | None
    num_blocks: int | None
    shape: tuple[int, ...]
    why: str = field(default="", compare=False)
    expert: Role | None = None
    stack: str = "text"
    main: bool = True

    @property
    def parts(self) -> tuple[Role, ...]:
        """What it is asked for as: the parts of its role, of an expert's own linear where known."""
        return (self.expert or self.role).parts

    @property
    def parameters(self) -> int:
        """Number of values in the weight."""
        return math.prod(self.shape)

    @property
    def is_block_linear(self) -> bool:
        """Whether the selector `all` means it: inside a block, with a role that is known.

        Routers, experts, adapters and what mixes residual streams are left out too.
        """
        return self.block is not None and self.role not in _NOT_BLOCK_LINEARS
