"""Selectors for sets of a model's linears: what they are called, and not one by one."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from fp4graph.linears.selector import parse
from fp4graph.linears.tags import Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp4graph.linears.tags import LinearTag


def selectors_for(members: Sequence[LinearTag], tags: Sequence[LinearTag]) -> list[str]:
    """Return selectors that pick some linears and no others: a role, its blocks, or their paths.

    Args:
        members: the linears to pick.
        tags: all linears of the model.
    """
    found: dict[str, list[str]] = defaultdict(list)
    paths: list[str] = []
    for name in dict.fromkeys(_name(tag) for tag in members):
        mine = {tag for tag in members if _name(tag) == name}
        for runs in ([""], _blocks(mine)):
            texts = [",".join([name, *([run] if run else [])]) for run in runs]
            if _picked(texts, tags) == mine:
                for run in runs:
                    found[run].append(name)
                break
        else:
            paths += [f"path:{tag.fqn}" for tag in members if tag in mine]
    texts = [",".join([*names, *([run] if run else [])]) for run, names in found.items()]
    return [*texts, *([" | ".join(paths)] if paths else [])]


def _picked(texts: Iterable[str], tags: Sequence[LinearTag]) -> set[LinearTag]:
    selectors = [parse(text) for text in texts]
    return {tag for tag in tags if any(selector.picks(tag) for selector in selectors)}


def _name(tag: LinearTag) -> str:
    if tag.role is Role.EXPERT and tag.expert is not None:
        return f"expert:{tag.expert}"
    return str(tag.role)


def _blocks(mine: Iterable[LinearTag]) -> list[str]:
    """Return runs of blocks as comparisons."""
    blocks = sorted({tag.block for tag in mine if tag.block is not None})
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return [f"blocks={a}" if a == b else f"blocks={a}..{b}" for a, b in runs]
