"""Cuts that were timed on this machine, by `fp4graph gpu-check`; they go before arithmetic."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING

from fp4graph.cache import kept_file
from fp4graph.files import read_lines, write_text
from fp4graph.kernels.triton.mma.cut import Cut, choose, tokens_of
from fp4graph.kernels.triton.mma.layout import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fp4graph.kernels.target import Target

_LOG = logging.getLogger("fp4graph.kernels")
Sizes = tuple[int, int, int]
"""Eights of rows of x in a program, N, K."""


@lru_cache(maxsize=4096)  # a launch asks
def cut_for(M: int, N: int, K: int, target: Target) -> Cut:
    """Return the cut that was found best on this machine, or else the one that `choose` takes."""
    found = _read(_file(target)).get((tokens_of(M), N, K))
    return found or choose(M, N, K, target)


def keep(found: Mapping[Sizes, Cut], target: Target) -> Path:
    """Keep cuts beside those kept before, and return the file.

    Raises:
        OSError: it cannot be written.
    """
    file = _file(target)
    known = {**_read(file), **found}
    lines = [json.dumps({"sizes": sizes, **asdict(cut)}) for sizes, cut in known.items()]
    write_text(file, "\n".join(lines) + "\n")
    cut_for.cache_clear()
    return file


def _file(target: Target) -> Path:
    return kept_file("cuts", target.backend, target.arch, target.multiprocessors)


def _read(file: Path) -> dict[Sizes, Cut]:
    found = {}
    try:
        for _, line in read_lines(file):
            values = json.loads(line)
            tokens, n, k = values.pop("sizes")
            found[tokens, n, k] = cut = Cut(**values)
            if cut.tokens != tokens or -(-k // COLUMNS) % cut.wk:  # it would leave columns out
                raise ValueError(f"{cut} does not fit {tokens}, {n}, {k}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _LOG.warning("%s cannot be read and does not count (%s): gpu-check makes it", file, error)
        return {}
    return found
