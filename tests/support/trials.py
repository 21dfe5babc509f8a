"""Plans of trials from texts, and rows as if measured."""

from collections.abc import Sequence

from fp4graph import Selector
from fp4graph.study.trial import Direction, Row, Trial, schemes, trials


def plan(
    *selectors: str,
    formats: Sequence[str] = ("nvfp4",),
    activations: Sequence[str] = ("none",),
    directions: Sequence[Direction] = ("only",),
    quantizers: Sequence[str] = ("rtn",),
) -> list[Trial]:
    ways = schemes(formats, activations, quantizers)
    return trials(list(map(Selector, selectors)), ways, directions)


def row(selector: str, kl: float, direction: str = "only", **changes: object) -> Row:
    known = dict.fromkeys(Row.__dataclass_fields__, 0)
    known |= {"selector": selector, "kl": kl, "dnll": 2 * kl, "dnll_se": 0.1}
    known |= {"direction": direction, "format": "nvfp4", "activations": "none", "quantizer": "rtn"}
    return Row.of({**known, **changes})
