"""What a run of trials is going to take, told before it begins."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp4graph.study.progress import duration
from fp4graph.study.trial import DENSE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp4graph.linears.tags import LinearTag
    from fp4graph.study.trial import Trial


@dataclass(frozen=True)
class Forecast:
    """What a run is going to take.

    Attributes:
        trials: how many, those that are kept from earlier runs included.
        windows: of the text.
        seconds: of each trial that is not kept, in their order, told from one window's time.
        logits: bytes of the dense model's log probabilities, kept while trials run.
        dense: bytes of the model's weights.
        packed: bytes that come on top of them where all block linears are in FP4; of a streamed
            model those of its largest block.
        streamed: whether the weights stay on disk.
    """

    trials: int
    windows: int
    seconds: tuple[float, ...]
    logits: int
    dense: int
    packed: int
    streamed: bool = False

    def done_in(self, budget: float) -> int:
        """Return how many trials will have ended after a number of seconds, kept ones included."""
        ends = itertools.accumulate(self.seconds)
        return self.trials - len(self.seconds) + max(sum(end <= budget for end in ends), 1)

    def __str__(self) -> str:
        kept = self.trials - len(self.seconds)
        text = f"{self.trials} trials{f', {kept} of them kept from before' if kept else ''}"
        if not self.seconds:
            return f"{text}: nothing to run"
        where = "on disk" if self.streamed else "in memory"
        return (
            f"{text}, {self.windows} windows each: about {duration(sum(self.seconds))}; "
            f"{self.dense / 1e9:.1f} GB of weights {where}, up to {self.packed / 1e9:.1f} GB of "
            f"packed ones, {self.logits / 1e9:.1f} GB on disk for the dense model's predictions"
        )


def share(trial: Trial, tags: Sequence[LinearTag]) -> float:
    """Return how much of the model comes after the first block that a trial changes, 0 to 1."""
    blocks = 1 + max((tag.block or 0 for tag in tags), default=0)
    if trial == DENSE:
        return 1.0
    policy, base = trial.policy, trial.base
    changed = [
        tag.block or 0
        for tag in tags
        if policy.decide(tag).scheme != (base.decide(tag).scheme if base else None)
    ]
    return 1.0 - min(changed, default=0) / blocks
