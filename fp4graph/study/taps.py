"""How a study looks into a model's linears: whole, or block by block."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fp4graph import LinearTap, StreamedTap
from fp4graph.cache import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fp4graph import TracedModel
    from fp4graph.models import LoadedModel
    from fp4graph.traced.tap import Inputs, Losses, Step

_LOG = logging.getLogger("fp4graph.stream")


def steps_of(
    loaded: LoadedModel,
    traced: TracedModel,
    inputs: Sequence[Inputs],
    progress: Callable[[], None],
    losses: Losses | None = None,
) -> Iterator[Step]:
    """Yield what linears saw, and the gradients of losses: see `LinearTap.steps`.

    A streamed model runs block by block, so that an input has a step for each. Progress is told
    once for each input.
    """
    parts, found = 1, None
    if loaded.streamed:
        tap = StreamedTap(traced, inputs, cache_folder(), losses)
        if tap.refusal is None:
            parts, found = tap.parts, tap.steps()
        else:
            _LOG.warning("each window runs the whole model: %s", tap.refusal)
    for number, step in enumerate(found or LinearTap(traced).steps(inputs, losses), 1):
        yield step
        if not number % parts:
            progress()
