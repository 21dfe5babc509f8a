"""Where a linear stands: in which stack of blocks, and in which block of it.

A model is one stack of blocks, or several: a language model with a vision tower, an encoder and a
decoder. Each counts its blocks for itself. A list of blocks is a numbered group of siblings that
hold the same linears and run one after another, whatever its name; a few names say so too where
there is just one block, or a graph of one. The outermost list counts.

>>> block_of("model.visual.blocks.7.attn.qkv"), stack_of("model.visual.blocks.7.attn.qkv")
(7, 'vision')
>>> block_of("lm_head"), stack_of("model.layers.3.mlp.up_proj")
(None, 'text')
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fp4graph.linears.tags import LinearTag

STACKS = ("text", "vision", "audio", "encoder", "decoder")
"""Names of stacks. Blocks whose path says nothing are `text`, the language model's."""

_LIST = re.compile(r"h|attentions|ffns|\w*layers?|\w*blocks?")
_EXPERTS = re.compile(r"(?:^|\.)\w*experts?$")
_FEWEST_LINEARS = 2
# what is asked first wins: `text_encoder.` is an encoder, `vision_tower.encoder.` is not
_WORDS = (
    ("encoder", re.compile(r"text_encoder")),
    ("vision", re.compile(r"vision|visual|image|video|(?:^|[._])vi?t(?:[._]|$)")),
    ("audio", re.compile(r"audio|speech")),
    ("text", re.compile(r"text|language|(?:^|[._])llm(?:[._]|$)")),
    ("encoder", re.compile(r"encoder")),
    ("decoder", re.compile(r"decoder")),
)


Lists = frozenset[str]
"""Paths of lists of blocks."""

NO_LISTS: Lists = frozenset()


def block_lists(paths: Iterable[str]) -> Lists:
    """Return the numbered groups of siblings of which some hold the same linears, two or more.

    A bare number elsewhere (`lm_heads.0`, `merger.mlp.0`) is no block, and experts are none.

    Args:
        paths: of a model's linears.

    >>> sorted(block_lists(["b.0.x", "b.0.y", "b.1.x", "b.1.y", "c.0.x", "c.1.x", "d.0", "d.1"]))
    ['b']
    """
    members: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in paths:
        parts = path.split(".")
        for place, part in enumerate(parts[:-1]):
            if part.isdecimal():
                inside = ".".join(parts[place + 1 :])
                members[".".join(parts[:place])][part].add(inside)
    found = set()
    for name, siblings in members.items():
        alike = Counter(
            frozenset(each) for each in siblings.values() if len(each) >= _FEWEST_LINEARS
        )
        if max(alike.values(), default=0) > 1 and not _EXPERTS.search(name):
            found.add(name)
    return frozenset(found)


def _parted(fqn: str, lists: Lists) -> tuple[str, int | None, str]:
    """Return a path in three: the list of blocks, the number in it, what comes below."""
    parts = fqn.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            above = parts[:place]
            if ".".join(above) in lists or (above and _LIST.fullmatch(above[-1])):
                return ".".join(above), int(part), ".".join(parts[place + 1 :])
    return fqn.rpartition(".")[0], None, fqn


def list_of(fqn: str, lists: Lists = NO_LISTS) -> str | None:
    """Return the path of the list of blocks that a module is in, or None outside the blocks."""
    name, block, _ = _parted(fqn, lists)
    return None if block is None else name


def below_block(fqn: str, lists: Lists = NO_LISTS) -> str:
    """Return what follows the block index in a module path, outside the blocks the whole path."""
    return _parted(fqn, lists)[2]


def block_of(fqn: str, lists: Lists = NO_LISTS) -> int | None:
    """Return the block index in a module path, or None outside the blocks."""
    return _parted(fqn, lists)[1]


def stack_of(fqn: str, lists: Lists = NO_LISTS) -> str:
    """Return the name of the stack that a module path leads to, one of `STACKS`."""
    name, block, _ = _parted(fqn, lists)
    above = name.rpartition(".")[0] if block is not None and _named(name) else name
    return next((name for name, word in _WORDS if word.search(above)), "text")


def _named(name: str) -> bool:
    return bool(_LIST.fullmatch(name.rpartition(".")[2]))


@dataclass(frozen=True)
class Stacks:
    """The stacks of a model.

    Attributes:
        blocks: number of blocks by the stack's name.
    """

    blocks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, tags: Iterable[LinearTag]) -> Stacks:
        """Count the blocks of every stack, from the highest index."""
        blocks: dict[str, int] = {}
        for tag in tags:
            if tag.block is not None:
                blocks[tag.stack] = max(blocks.get(tag.stack, 0), tag.block + 1)
        return cls(blocks)

    @property
    def main(self) -> str | None:
        """The stack that selectors mean which name none: the language model's, or the only one."""
        ranked = ("text", "decoder", "encoder", *self.blocks)
        return next((name for name in ranked if name in self.blocks), None)

    def place(self, tag: LinearTag) -> LinearTag:
        """Tell a tag how many blocks its stack has, and whether that is the main one.

        What stands outside all blocks, as `lm_head` does, goes with the main stack unless its path
        names another.
        """
        stack = tag.stack if tag.stack in self.blocks else self.main
        blocks = None if stack is None else self.blocks[stack]
        return replace(tag, num_blocks=blocks, main=stack == self.main)

    def __str__(self) -> str:
        return ", ".join(f"{name} 0..{count - 1}" for name, count in self.blocks.items())
