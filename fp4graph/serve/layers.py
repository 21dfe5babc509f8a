"""What engines compute as one layer, by their own names for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp4graph.checkpoints.fused import ENGINE_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fp4graph.serve.checkpoint import Linear

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.([^.]+)")


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: as the engine calls it.
        kind: the engine's class, near enough for matches by class: `QKVParallelLinear`, ....
        shards: names that it asks the configuration for, whether they are on disk or not.
        linears: those that are.
    """

    name: str
    kind: str
    shards: tuple[str, ...]
    linears: tuple[Linear, ...]

    @property
    def is_fused(self) -> bool:
        """Whether it is more than one linear."""
        return len(self.shards) > 1

    @property
    def is_experts(self) -> bool:
        """Whether it is all experts of a block."""
        return self.kind == "RoutedExperts"


def layers_of(linears: Iterable[Linear]) -> list[Layer]:
    """Return the layers that linears make up."""
    groups: dict[tuple[str, str], list[Linear]] = {}
    for linear in linears:
        expert = _EXPERT.fullmatch(linear.name)
        if expert is not None:
            groups.setdefault((expert[1], "RoutedExperts"), []).append(linear)
            continue
        fused = next((name for name, parts in ENGINE_NAMES.items() if linear.last in parts), "")
        name = f"{linear.parent}.{fused}" if fused else linear.name
        groups.setdefault((name, fused), []).append(linear)
    return [_layer(name, kind, members) for (name, kind), members in groups.items()]


def _layer(name: str, kind: str, members: list[Linear]) -> Layer:
    if kind == "RoutedExperts":
        first = [each.name for each in members if each.name.startswith(f"{name}.0.")]
        return Layer(name, kind, tuple(first), tuple(members))
    if not kind:
        head = "ParallelLMHead" if members[0].last == "lm_head" else "RowParallelLinear"
        return Layer(name, head, (name,), tuple(members))
    parent = name.rpartition(".")[0]
    shards = tuple(f"{parent}.{part}" for part in ENGINE_NAMES[kind])
    engine = "QKVParallelLinear" if kind == "qkv_proj" else "MergedColumnParallelLinear"
    return Layer(name, engine, shards, tuple(members))
