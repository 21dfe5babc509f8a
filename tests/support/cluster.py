"""Models that a worker in another process can load by a function's name."""

from __future__ import annotations

from support.models import tiny

from fp4graph import ModelError
from fp4graph.models import LoadedModel


def loaded() -> LoadedModel:
    """Return a tiny model that can be loaded again."""
    return LoadedModel("tiny", tiny("llama").requires_grad_(False), None, again=loaded)


def another() -> LoadedModel:
    """Return one whose name means another model in every other process."""
    return LoadedModel("tiny", tiny("qwen2").requires_grad_(False), None, again=loaded)


def lost() -> LoadedModel:
    """Return one that no other process can load."""
    return LoadedModel("tiny", tiny("llama").requires_grad_(False), None, again=_fail)


def _fail() -> LoadedModel:
    raise ModelError("nothing loads by the name 'tiny'")
