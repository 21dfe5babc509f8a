"""Outliers of linears' inputs and weights: the statistics of 2603.08747's Table 1, and more."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fp4graph import TracedModel
from fp4graph.models import check_length
from fp4graph.study.taps import steps_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fp4graph.linears.tags import LinearTag
    from fp4graph.models import LoadedModel
    from fp4graph.study.evaluate import Windows

_BINS = 1 << 15  # the upper half of a float32 without its sign
_QUANTILE = 0.999
_FAR = 10.0


@dataclass(frozen=True)
class Outliers:
    """How far the values of a tensor reach.

    Attributes:
        p999: the magnitude that 99.9 % of values stay below, to 1 part in 256.
        max: the largest magnitude.
        ratio: max over p999.
        kurtosis: of the values, 3 for a normal distribution.
        rms: root of the mean square.
        outlier_channels: columns whose largest magnitude is above 10 times the median column's.
    """

    p999: float
    max: float
    ratio: float
    kurtosis: float
    rms: float
    outlier_channels: int


class Accumulator:
    """Takes in a tensor piece by piece.

    Args:
        channels: size of the last dimension.
    """

    def __init__(self, channels: int) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.int64, device="cpu")
        self._powers = torch.zeros(4, dtype=torch.float64, device="cpu")  # sums of x^1 to x^4
        self._largest_K = torch.zeros(channels, dtype=torch.float32, device="cpu")

    def add(self, x: Tensor) -> None:
        """Take in values, [..., K]."""
        x_MK = x.reshape(-1, x.shape[-1]).to(torch.float32)
        magnitude_MK = x_MK.abs().contiguous()
        bits = magnitude_MK.view(torch.int32) >> 16
        self._counts += bits.flatten().bincount(minlength=_BINS).cpu()
        wide = x_MK.double()
        square = wide * wide
        sums = wide.sum(), square.sum(), (square * wide).sum(), (square * square).sum()
        self._powers += torch.stack(sums).cpu()
        self._largest_K = torch.maximum(self._largest_K, magnitude_MK.amax(0).cpu())

    def result(self) -> Outliers:
        """Return what was seen."""
        total = int(self._counts.sum())
        below = self._counts.cumsum(0).double()
        bin_ = int((below < _QUANTILE * total).sum())
        edges = torch.tensor([bin_, bin_ + 1], dtype=torch.int32, device="cpu") << 16
        p999 = float(edges.view(torch.float32).mean())
        largest = float(self._largest_K.max())
        mean, square, cube, fourth = (self._powers / max(total, 1)).tolist()
        variance = square - mean**2
        central = fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
        median = float(self._largest_K.median())
        return Outliers(
            p999=min(p999, largest),
            max=largest,
            ratio=largest / min(p999, largest) if largest else 1.0,
            kurtosis=central / variance**2 if variance > 0 else 0.0,
            rms=square**0.5,
            outlier_channels=int((self._largest_K > _FAR * median).sum()),
        )


@dataclass(frozen=True)
class OutlierRow:
    """One linear; the fields are the keys of the JSON lines.

    Attributes:
        path: module path.
        role: role by its selector name.
        block: block index, None outside the blocks.
        shape: of the weight.
        tokens: rows of input that were seen.
        input: of its input.
        weight: of its weight.
    """

    path: str
    role: str
    block: int | None
    shape: tuple[int, ...]
    tokens: int
    input: Outliers
    weight: Outliers


def input_ranges(loaded: LoadedModel, windows: Windows) -> dict[str, float]:
    """Return the largest magnitude of each linear's inputs, by its path; errors as `outliers`."""
    return {row.path: row.input.max for row in outliers(loaded, windows, lambda: None).values()}


@torch.no_grad()
def outliers(
    loaded: LoadedModel, windows: Windows, progress: Callable[[], None]
) -> dict[LinearTag, OutlierRow]:
    """Measure the inputs and weights of a model's linears, experts left out.

    Raises:
        ModelError: a window is longer than the model's positions.
        StudyError: the model hides its linears inside higher-order ops.
    """
    check_length(loaded.model, windows.ids.shape[1])
    traced = TracedModel(loaded.model)
    all_ids = windows.ids.to(loaded.device)
    traced.settle(input_ids=all_ids[:1], use_cache=False)
    seen: dict[str, Accumulator] = {}
    tokens: dict[str, int] = defaultdict(int)
    weights: dict[LinearTag, Outliers] = {}
    inputs = [{"input_ids": ids, "use_cache": False} for ids in all_ids.split(1)]
    for step in steps_of(loaded, traced, inputs, progress):
        # q, k and v have one input between them
        own: dict[tuple[tuple[int, int], ...], Accumulator] = {}
        for tag, calls in step.seen.items():
            xs = [call.x for call in calls]
            tokens[tag.fqn] += sum(x.numel() // x.shape[-1] for x in xs)
            key = tuple((x.data_ptr(), x.shape[-1]) for x in xs)
            if key not in own:
                own[key] = seen.setdefault(tag.fqn, Accumulator(tag.shape[1]))
                for x in xs:
                    own[key].add(x)
            seen[tag.fqn] = own[key]
            if tag not in weights:
                weight = Accumulator(tag.shape[1])
                weight.add(calls[0].weight)
                weights[tag] = weight.result()
    found = {}
    for tag in weights:
        row = (tag.fqn, str(tag.role), tag.block, tag.shape, tokens[tag.fqn])
        found[tag] = OutlierRow(*row, seen[tag.fqn].result(), weights[tag])
    return found


def by_role(rows: Iterable[OutlierRow]) -> dict[str, tuple[Outliers, Outliers]]:
    """Return means over the linears of each role: of inputs, of weights."""
    groups: dict[str, list[OutlierRow]] = defaultdict(list)
    for row in rows:
        groups[row.role].append(row)
    return {
        role: (_mean(row.input for row in group), _mean(row.weight for row in group))
        for role, group in groups.items()
    }


def _mean(found: Iterable[Outliers]) -> Outliers:
    each = list(found)
    return Outliers(
        p999=fmean(one.p999 for one in each),
        max=fmean(one.max for one in each),
        ratio=fmean(one.ratio for one in each),
        kurtosis=fmean(one.kurtosis for one in each),
        rms=fmean(one.rms for one in each),
        outlier_channels=round(fmean(one.outlier_channels for one in each)),
    )
