"""Where a linear stands: in which stack of blocks, and in which block of it.

A model is one stack of blocks, or several: a language model with a vision tower, an encoder and a
decoder. Each counts its blocks for itself.

>>> block_of("model.visual.blocks.7.attn.qkv"), stack_of("model.visual.blocks.7.attn.qkv")
(7, 'vision')
>>> block_of("lm_head"), stack_of("model.layers.3.mlp.up_proj")
(None, 'text')
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fp4graph.tags import LinearTag

STACKS = ("text", "vision", "audio", "encoder", "decoder")
"""Names of stacks. Blocks whose path says nothing are `text`, the language model's."""

# a list of blocks; a bare number elsewhere (`lm_heads.0`, `merger.mlp.0`) is no block
_BLOCK = re.compile(r"(?:^|\.)(?:h|attentions|ffns|\w*layers?|\w*blocks?)\.(\d+)(?:\.|$)")
# what is asked first wins: `text_encoder.` is an encoder, `vision_tower.encoder.` is not
_WORDS = (
    ("encoder", re.compile(r"text_encoder")),
    ("vision", re.compile(r"vision|visual|image|video|(?:^|[._])vi?t(?:[._]|$)")),
    ("audio", re.compile(r"audio|speech")),
    ("text", re.compile(r"text|language|(?:^|[._])llm(?:[._]|$)")),
    ("encoder", re.compile(r"encoder")),
    ("decoder", re.compile(r"decoder")),
)


def below_block(fqn: str) -> str:
    """Return what follows the block index in a module path, outside the blocks the whole path."""
    found = _BLOCK.search(fqn)
    return fqn[found.end() :] if found else fqn


def block_of(fqn: str) -> int | None:
    """Return the block index in a module path, or None outside the blocks."""
    found = _BLOCK.search(fqn)
    return int(found.group(1)) if found else None


def stack_of(fqn: str) -> str:
    """Return the name of the stack that a module path leads to, one of `STACKS`."""
    found = _BLOCK.search(fqn)
    above = fqn[: found.start()] if found else fqn.rpartition(".")[0]
    return next((name for name, word in _WORDS if word.search(above)), "text")


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
