"""The best mix for a budget: what is measured or estimated, put together and solved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import fsum, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from fp4graph import OptionError, Policy, Scheme, Selector, StudyError
from fp4graph.budget.damage import damages
from fp4graph.budget.plan import DENSE_BYTES, Budget, Choice, Item
from fp4graph.budget.solve import solve
from fp4graph.budget.times import times
from fp4graph.checkpoints.fused import fused_sets
from fp4graph.quantizers import Quantizer
from fp4graph.scheme import ENGINES
from fp4graph.study.given import in_evaluation, texts_of, windows_of
from fp4graph.study.measured import measured
from fp4graph.study.progress import shown
from fp4graph.study.results import open_results
from fp4graph.study.sensitivity import Sensitivity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from fp4graph.budget.damage import Damage
    from fp4graph.budget.plan import Plan
    from fp4graph.linears.tags import LinearTag
    from fp4graph.models import LoadedModel
    from fp4graph.study.evaluate import Windows
    from fp4graph.study.given import Texts
    from fp4graph.study.progress import Progress
    from fp4graph.study.sensitivity import SensitivityRow

FORMATS = ("nvfp4", "mxfp4", "fp8")
_ALL = Selector("all")


@dataclass(frozen=True)
class Request:
    """What is looked for.

    Attributes:
        budget: what a plan may cost.
        schemes: what linears may run in beside dense.
        serve: `vllm` or `sglang`: linears that engines compute as one run in one way.
        store: a folder of `ablate`: what was measured there stands in place of estimates.
        rows: of the input, for times.
        samples: see `fp4graph.study.sensitivity`.
        count: how many plans.
        timed: whether choices are timed though the budget is not of time.

    Raises:
        OptionError: no such engine.
    """

    budget: Budget
    schemes: tuple[Scheme, ...]
    serve: str | None = None
    store: Path | str | None = None
    rows: int = 1
    samples: int = 2
    count: int = 1
    timed: bool = False

    def __post_init__(self) -> None:
        if self.serve is not None and self.serve not in ENGINES:
            raise OptionError(f"serve={self.serve!r}: expected {', '.join(ENGINES)}")


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        tags: all linears of the model.
        items: what was chosen for, with what each may run as.
        budget: what a plan may cost.
        plans: the best, the best first.
        scores: estimates of each linear in each scheme.
        notes: where the damage is from, a sentence a scheme.
    """

    tags: tuple[LinearTag, ...]
    items: tuple[Item, ...]
    budget: Budget
    plans: tuple[Plan, ...]
    scores: Mapping[tuple[Scheme, LinearTag], SensitivityRow]
    notes: tuple[str, ...]


def best_policy(
    model: nn.Module | LoadedModel,
    tokens: Tensor | Windows,
    *,
    bits: float | None = None,
    bytes: float | None = None,
    ms: float | None = None,
    speedup: float | None = None,
    kl: float | None = None,
    format: Texts = FORMATS,
    activations: str = "none",
    quantizer: Texts = "rtn",
    serve: str | None = None,
    store: Path | str | None = None,
    rows: int = 1,
    samples: int = 2,
    progress: Progress | None = None,
) -> Policy:
    """Return the mix of formats that costs least within a budget; what is given is just one.

    What each block linear costs alone is added up: of single linears that sum is within 0.86 to
    1.10 of what a set costs (docs/studies.md). The choice is then solved exactly.

    Args:
        model: a causal language model of transformers, or one that `fp4graph.models.load` loaded.
        tokens: token ids, int64 [windows, length], that damage is estimated on.
        bits: most bits a value of all block linears' weights, scales included; dense is 16.
        bytes: most bytes of them.
        ms: most milliseconds that they take for an input of `rows` rows, as timed on this machine,
            one after the other; attention, norms and the head come on top.
        speedup: how much faster than dense they are to be, in the same sense.
        kl: most nats a token; the fewest bytes are found.
        format: what linears may run in beside dense.
        activations: `none` or `same`.
        quantizer: how codes are found; of several, each is a choice wherever the format has it.
        serve: `vllm` or `sglang`: linears that engines compute as one run in one way.
        store: a folder of `ablate`: what was measured there stands in place of estimates.
        rows: of the input, for times: 1 is decoding.
        samples: see `fp4graph.study.sensitivity`.
        progress: is told how far it is; None shows it where this runs.

    Raises:
        OptionError: no budget or several; one that cannot be met; a value that does not exist.
        StudyError: the model's weights are random; no results in `store`; nothing says what a
            linear costs.
        ModelError, CorpusError: see `fp4graph.study.sensitivity`.
    """
    budget = Budget.of(bits=bits, bytes=bytes, ms=ms, speedup=speedup, kl=kl)
    schemes = schemes_for(texts_of(format), texts_of(quantizer), activations)
    request = Request(budget, schemes, serve, store, rows, samples)
    with shown(progress) as told, in_evaluation(model) as loaded:
        found = search(loaded, windows_of(loaded, tokens), request, told)
    return found.plans[0].policy(found.tags)


def schemes_for(
    formats: Sequence[str], quantizers: Sequence[str], activations: str
) -> tuple[Scheme, ...]:
    """Return every format with every quantizer that it has; rounding to nearest where it has none.

    Raises:
        OptionError: a value that does not exist, or that no format has.
    """
    found: list[Scheme] = []
    wrong: dict[str, OptionError] = {}
    for format in formats:
        base, able = Scheme.read(format, "rtn", activations, "auto"), []
        for how in quantizers:
            try:
                able.append(replace(base, quantizer=Quantizer.parse(how, base.format)))
            except OptionError as error:
                wrong[how] = error
        found += able or [base]
    used = {str(scheme.quantizer) for scheme in found}
    lost = next((error for how, error in wrong.items() if how not in used), None)
    if lost is not None:
        raise lost
    return tuple(dict.fromkeys(found))


def search(loaded: LoadedModel, windows: Windows, request: Request, progress: Progress) -> Search:
    """Find the best plans.

    Args:
        loaded: the model.
        windows: the text that damage is estimated on.
        request: what is looked for.
        progress: is told how far it is.

    Raises:
        as `best_policy`.
    """
    schemes = request.schemes
    estimated = tuple(dict.fromkeys(replace(each, quantizer=_nearest(each)) for each in schemes))
    progress.start(len(windows.ids), "windows")
    scored = Sensitivity(loaded, windows, estimated, request.samples, progress.advance)
    tags = scored.tags
    settings = []
    if request.store is not None:
        results = open_results(Path(request.store))
        settings = measured(results, loaded.revision(), tags)
        results.close()
    scores = _scores(scored, schemes, tags)
    left_out = _left_out(scored, schemes)
    able = {tag for tag in tags if _ALL.picks(tag) and tag.fqn not in left_out}
    costs: dict[Scheme, dict[LinearTag, Damage]] = {}
    notes = [_left(left_out)] if left_out else []
    for scheme in schemes:
        mine = [tag for tag in tags if tag in able]
        costs[scheme], said = damages(scheme, mine, settings, scored.rows)
        notes.append(said)
    us: dict[tuple[tuple[int, int], Scheme | None], float] = {}
    if request.timed or request.budget.needs_times:
        shapes = dict.fromkeys((tag.shape[-2], tag.shape[-1]) for tag in able)
        progress.start(len(shapes), "shapes")
        ways: list[Scheme | None] = [None, *schemes]
        where = {"rows": request.rows, "device": loaded.device}
        us = times(shapes, ways, **where, progress=progress.advance)  # type: ignore[arg-type]
    items = tuple(_item(group, schemes, costs, us) for group in _groups(tags, able, request.serve))
    if not items:
        raise StudyError("the model has no block linear to choose for")
    plans = tuple(solve(items, request.budget, request.count))
    return Search(tags, items, request.budget, plans, scores, tuple(notes))


def _nearest(scheme: Scheme) -> Quantizer:
    """Return the quantizer that a scheme's damage is estimated with."""
    how = scheme.quantizer
    rounds = how.needs_data or how.rotation
    return Quantizer.parse("rtn", scheme.format) if rounds else how


def _scores(
    scored: Sensitivity, schemes: Sequence[Scheme], tags: Sequence[LinearTag]
) -> dict[tuple[Scheme, LinearTag], SensitivityRow]:
    by_way = {(row.format, row.activations, row.quantizer, row.path): row for row in scored.rows}
    return {
        (scheme, tag): by_way[key]
        for scheme in schemes
        for tag in tags
        if (key := (str(scheme.format), scheme.activations, str(_nearest(scheme)), tag.fqn))
        in by_way
    }


def _left_out(scored: Sensitivity, schemes: Sequence[Scheme]) -> dict[str, str]:
    """Return the paths of block linears that stay dense whatever the budget, and why."""
    found = dict.fromkeys(scored.left_out, "its weight or its damage cannot be told from a run")
    for scheme in schemes:
        report = scored.traced.plan(Policy(((_ALL, scheme),)))
        found |= {row.path: row.reason for row in report.refused}
    return found


def _left(left_out: Mapping[str, str]) -> str:
    path, why = next(iter(left_out.items()))
    return f"{len(left_out)} linears stay dense and are not counted, such as {path}: {why}"


def _groups(
    tags: Sequence[LinearTag], able: set[LinearTag], serve: str | None
) -> list[tuple[LinearTag, ...]]:
    """Return the linears that run in one way; those of a set that cannot all run stay dense."""
    together: dict[LinearTag, tuple[LinearTag, ...]] = {}
    for each in fused_sets(tags) if serve else ():
        for tag in each.members:
            together[tag] = each.members
    groups = dict.fromkeys(together.get(tag, (tag,)) for tag in tags if tag in able)
    return [group for group in groups if able.issuperset(group)]


def _item(
    tags: tuple[LinearTag, ...],
    schemes: Sequence[Scheme],
    costs: Mapping[Scheme, Mapping[LinearTag, Damage]],
    us: Mapping[tuple[tuple[int, int], Scheme | None], float],
) -> Item:
    def taken(scheme: Scheme | None) -> float | None:
        return fsum(us[(t.shape[-2], t.shape[-1]), scheme] for t in tags) if us else None

    choices = [Choice(None, 0.0, 0.0, DENSE_BYTES * sum(t.parameters for t in tags), taken(None))]
    for scheme in schemes:
        cost = [costs[scheme][tag] for tag in tags]
        error = sqrt(fsum(each.error**2 for each in cost))
        nbytes = sum(scheme.format.packed_bytes(*tag.shape[-2:]) for tag in tags)
        choices.append(Choice(scheme, fsum(c.kl for c in cost), error, nbytes, taken(scheme)))
    return Item(tags, tuple(choices))
