"""Which tensor of a checkpoint is the weight of which linear of the model."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_EXPERT = re.compile(r".*\.(\d+)\.[^.]+\.weight")


@dataclass(frozen=True)
class OnDisk:
    """A matrix of a checkpoint.

    Attributes:
        path: of the linear, as the model has it.
        expert: number, where it is one of a stack; else None.
        is_down: of an expert, whether it is alone in its stack, and not beside another.
        place: of an expert, which of those beside each other it is; gate comes first.
    """

    path: str
    expert: int | None = None
    is_down: bool = False
    place: int = 0


class Names:
    """The matrices of a checkpoint, by the rules with which transformers reads it.

    Args:
        model: on any device.
        names: of all tensors in the checkpoint.

    Attributes:
        linears: what each tensor is that belongs to a linear or to a stack of experts.
        embeddings: tensors that are looked up in.
        tensors: what the checkpoint calls each parameter that it holds as it is, by the parameter's
            path without `.weight`.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        state = model.state_dict()
        modules = dict(model.named_modules(remove_duplicate=False))
        prefix = model.base_model_prefix
        order = {
            pattern: (place, len(rule.source_patterns))
            for rule in converters
            for place, pattern in enumerate(rule.source_patterns)
        }
        found: dict[str, tuple[str, str | None]] = {}
        self.embeddings: set[str] = set()
        self.tensors: dict[str, str] = {}
        for name in names:
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if pattern is None:
                self.tensors[target.removesuffix(".weight")] = name
            if not name.endswith(".weight"):
                continue
            owner, _, last = target.rpartition(".")
            if isinstance(modules.get(owner), nn.Embedding):
                self.embeddings.add(name)
            if pattern is None and last == "weight" and isinstance(modules.get(owner), nn.Linear):
                found[name] = owner, None
            elif pattern is not None and target in state and state[target].ndim == 3:
                found[name] = target, pattern
        self.linears = {
            name: OnDisk(path) if pattern is None else _expert(name, path, pattern, order)
            for name, (path, pattern) in found.items()
        }
        self._by_path: dict[str, list[str]] = defaultdict(list)
        for name, linear in self.linears.items():
            self._by_path[linear.path].append(name)

    def of(self, path: str) -> list[str]:
        """Return the tensors of a linear or of a stack of experts."""
        return self._by_path.get(path, [])


def _expert(name: str, path: str, pattern: str, order: Mapping[str, tuple[int, int]]) -> OnDisk:
    number = _EXPERT.fullmatch(name)
    place, beside = order.get(pattern, (0, 1))
    return OnDisk(path, int(number[1]) if number else None, beside == 1, place)
