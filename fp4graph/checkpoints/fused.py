"""Linears that engines compute as one: they run in one way, and share a per-tensor scale.

vLLM 0.33 and SGLang join q, k and v, gate and up, the first linears of latent attention, and all
experts of a layer. A part of such a set that differs is refused there, or loaded wrongly.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fp4graph.errors import OptionError, RefusalError
from fp4graph.linears.selector import parse
from fp4graph.linears.tags import Role
from fp4graph.linears.texts import selectors_for
from fp4graph.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp4graph.linears.tags import LinearTag
    from fp4graph.scheme import Scheme

Round = Literal["up", "down"]
ENGINE_NAMES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""What vLLM 0.33 calls such sets (`packed_modules_mapping`), in Llama and most others, DeepSeek."""

_KINDS = {
    Role.Q: "qkv", Role.K: "qkv", Role.V: "qkv",
    Role.GATE: "gate_up", Role.UP: "gate_up",
    Role.Q_A: "qkv_a", Role.KV_A: "qkv_a",
    Role.EXPERT: "experts",
}  # fmt: skip
_SHOWN = 3


@dataclass(frozen=True)
class FusedSet:
    """Linears that are one in an engine.

    Attributes:
        path: of the module that they are in.
        kind: `qkv`, `gate_up`, `qkv_a` or `experts`.
        members: their tags.
    """

    path: str
    kind: str
    members: tuple[LinearTag, ...]

    def __str__(self) -> str:
        names = ", ".join(tag.fqn.removeprefix(f"{self.path}.") for tag in self.members)
        return f"{self.path} ({names})"


def fused_sets(tags: Iterable[LinearTag]) -> list[FusedSet]:
    """Return the sets of two linears and more."""
    found: dict[tuple[str, str], list[LinearTag]] = defaultdict(list)
    for tag in tags:
        if tag.role in _KINDS:
            path = tag.fqn.rpartition(".")[0]
            if tag.role is Role.EXPERT:
                path = path.partition(".experts")[0] or path
            found[path, _KINDS[tag.role]].append(tag)
    return [
        FusedSet(path, kind, tuple(dict.fromkeys(members)))
        for (path, kind), members in found.items()
        if len(set(members)) > 1
    ]


def closed(
    policy: Policy, tags: Sequence[LinearTag], how: Round | None = None
) -> tuple[Policy, list[LinearTag]]:
    """Return a policy that cuts no fused set, and the linears whose way it changes.

    Args:
        policy: what runs how.
        tags: all linears of the model.
        how: `up` takes in what is missing of a set, `down` leaves out what there is of it; None
            raises.

    Raises:
        RefusalError: a set is cut, and `how` is None; says what `up` and `down` would select.
        OptionError: two ways within a set, for `up`.
    """
    ways = {tag: policy.decide(tag).scheme for tag in tags}
    cut = [each for each in fused_sets(tags) if len({ways[tag] for tag in each.members}) > 1]
    if not cut:
        return policy, []
    if how is None:
        shown = "; ".join(map(str, cut[:_SHOWN]))
        more = f" and {len(cut) - _SHOWN} more" if len(cut) > _SHOWN else ""
        texts = []
        for each in ("up", "down"):
            try:
                texts.append(f"{each}: {_rounded(policy, cut, ways, tags, each)[0].text}")
            except OptionError:
                continue
        raise RefusalError(
            f"the selection cuts {len(cut)} sets of linears that engines compute as one: "
            f"{shown}{more}; round=up takes the rest in, round=down leaves them dense. "
            f"{'; '.join(texts)}"
        )
    return _rounded(policy, cut, ways, tags, how)


def _rounded(
    policy: Policy,
    cut: Sequence[FusedSet],
    ways: Mapping[LinearTag, Scheme | None],
    tags: Sequence[LinearTag],
    how: str,
) -> tuple[Policy, list[LinearTag]]:
    changed: dict[Scheme | None, list[LinearTag]] = defaultdict(list)
    for each in cut:
        schemes = {ways[tag] for tag in each.members} - {None}
        if how == "up" and len(schemes) > 1:
            raise OptionError(f"{each}: its linears run in several ways, so there is no way up")
        goal = next(iter(schemes)) if how == "up" else None
        changed[goal] += [tag for tag in each.members if ways[tag] != goal]
    entries = list(policy.entries)
    for goal, members in changed.items():
        entries += [(parse(text), goal) for text in selectors_for(members, tags)]
    return Policy(tuple(entries)), [tag for members in changed.values() for tag in members]
