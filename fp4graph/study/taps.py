"""Which way a study looks into a model's linears, and how far it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp4graph import LinearTap, StreamedTap
from fp4graph.cache import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fp4graph import TracedModel
    from fp4graph.models import LoadedModel
    from fp4graph.traced.tap import Step


def tap_of(loaded: LoadedModel, traced: TracedModel) -> LinearTap | StreamedTap:
    """Return what looks into a traced model: block by block if it is streamed."""
    return StreamedTap(traced, cache_folder()) if loaded.streamed else LinearTap(traced)


def told(steps: Iterable[Step], parts: int, progress: Callable[[], None]) -> Iterator[Step]:
    """Yield steps, of which each input has so many parts; tell progress once an input."""
    for number, step in enumerate(steps, 1):
        yield step
        if not number % parts:
            progress()
