"""Plans of trials from texts, and rows as if measured."""

import math
from collections.abc import Sequence

from fp4graph.study.plan import Group
from fp4graph.study.progress import Progress
from fp4graph.study.trial import Direction, Row, Trial


def plan(
    *selectors: str,
    formats: Sequence[str] = ("nvfp4",),
    activations: Sequence[str] = ("none",),
    directions: Sequence[Direction] = ("only",),
    quantizers: Sequence[str] = ("rtn",),
) -> list[Trial]:
    direction = {("only",): "only", ("except",): "except"}.get(tuple(directions), "both")
    group = Group(
        selectors, (), (), tuple(formats), tuple(activations), tuple(quantizers), direction
    )
    return group.read().trials()


class Counted(Progress):
    """Progress that only counts."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.kept: list[bool] = []
        self.notes: list[str] = []

    def start(
        self, steps: int, what: str, total: int | None = None, budget: float = math.inf
    ) -> None:
        self.total = steps

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, what: str = "") -> None:
        self.done += 1

    def ended(self, what: str, row: object, *, kept: bool = False) -> None:
        self.kept.append(kept)


def row(selector: str, kl: float, direction: str = "only", **changes: object) -> Row:
    known = dict.fromkeys(Row.__dataclass_fields__, 0)
    known |= {"selector": selector, "kl": kl, "dnll": 2 * kl, "dnll_se": 0.1}
    known |= {"direction": direction, "format": "nvfp4", "activations": "none", "quantizer": "rtn"}
    known["name"] = ""
    return Row(**{**known, **changes})
