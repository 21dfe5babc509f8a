"""Plans and what they have to beat, measured on text that nothing was estimated on."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from fp4graph.budget.plan import Budget
from fp4graph.budget.rivals import rivals
from fp4graph.budget.solve import solve
from fp4graph.study import Table, ablate
from fp4graph.study.plot_style import COLORS, MARKERS, save, title_over
from fp4graph.study.trial import DENSE, Trial
from fp4graph.study.verdicts import nats as in_nats
from fp4graph.study.views import ERRORS, is_nothing
from fp4graph.tables import Column, TextTable, digits_for, nats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from fp4graph import Calibration
    from fp4graph.budget.find import Search
    from fp4graph.budget.plan import Plan, Schemes
    from fp4graph.linears.tags import LinearTag
    from fp4graph.models import LoadedModel
    from fp4graph.study.evaluate import Windows
    from fp4graph.study.progress import Progress
    from fp4graph.study.trial import Row

_CURVE = 24  # budgets that the curve of predictions is solved for
_RANDOM = "random "
_BEYOND = 1.5  # of the dearest plan, where a picture ends


@dataclass(frozen=True)
class PlanRow:
    """A plan; the fields are the keys of the JSON lines.

    Attributes:
        plan: what found it.
        bits: bits a value of all block linears' weights, scales included; dense is 16.
        bytes: of them.
        ms: milliseconds that they take one after the other; None where they were not timed.
        predicted_kl: sum of what its linears cost alone, nats a token.
        predicted_se: standard error of that.
        measured_kl: KL divergence of the model from the dense one, nats a token; None where it was
            not measured.
        kl_se: standard error of that.
        regret: how far that is above the least that was measured.
        select: the plan as a mapping in JSON, which every `--select` takes.
    """

    plan: str
    bits: float
    bytes: int
    ms: float | None
    predicted_kl: float
    predicted_se: float
    measured_kl: float | None
    kl_se: float | None
    regret: float | None
    select: str


def compare(
    found: Search,
    loaded: LoadedModel,
    windows: Windows | None,
    *,
    calibrations: Sequence[Calibration] = (),
    out: Path | None = None,
    corpus: str = "",
    title: str = "",
    progress: Progress | None = None,
) -> Table:
    """Return plans as a table, and what was measured of them.

    Args:
        found: the plans.
        loaded: the model.
        windows: the text to measure on; None measures nothing, and plans stand alone.
        calibrations: codes found with data.
        out: a folder of `ablate` that keeps what is measured.
        corpus: what the text is called.
        title: of the table and its picture.
        progress: is told how far it is.

    Raises:
        as `fp4graph.study.ablate`; and OptionError: a quantizer needs data that is not there.
    """
    plans = list(found.plans)
    measured: dict[Schemes, Row] = {}
    if windows is not None:
        plans += rivals(found.items, _same_size(found), found.scores)
        distinct = {plan.schemes: plan for plan in reversed(plans) if any(plan.schemes)}
        policies = {key: plan.policy(found.tags) for key, plan in distinct.items()}
        ready = [each.calibrated(calibrations) for each in policies.values()]
        rows = ablate(
            loaded,
            windows,
            ready,
            name=[f"{plan.name} ({found.budget})" for plan in distinct.values()],
            out=out,
            corpus=corpus,
            progress=progress,
        )
        by_way = {tuple(getattr(row, key) for key in DENSE.facts): row for row in rows}
        for key, policy in zip(policies, ready, strict=True):
            measured[key] = by_way[tuple(Trial(policy).facts.values())]
        dense = next(row for row in rows if row.is_dense)
        measured |= {plan.schemes: dense for plan in plans if not any(plan.schemes)}
    table = [_row(plan, measured, found.tags) for plan in plans]
    return Table(
        table,
        _view(table, title, found),
        _verdict(table, found),
        draw=lambda path: _draw(table, found, title, path),
    )


def _same_size(found: Search) -> Budget:
    """Return the budget that what is compared with has to meet."""
    if found.budget.kind == "kl":
        return Budget("bytes", found.plans[0].nbytes)
    return found.budget


def _row(plan: Plan, measured: Mapping[Schemes, Row], tags: Sequence[LinearTag]) -> PlanRow:
    row = measured.get(plan.schemes)
    least = min((each.kl for each in measured.values()), default=0.0)
    policy = plan.policy(tags)
    return PlanRow(
        plan=plan.name,
        bits=plan.bits,
        bytes=plan.nbytes,
        ms=None if math.isnan(plan.us) else plan.us / 1000,
        predicted_kl=plan.kl,
        predicted_se=plan.kl_se,
        measured_kl=None if row is None else row.kl,
        kl_se=None if row is None else row.kl_se,
        regret=None if row is None else row.kl - least,
        select=json.dumps(
            {str(each): scheme.options if scheme else None for each, scheme in policy.entries}
        ),
    )


def _view(rows: Sequence[PlanRow], title: str, found: Search) -> TextTable:
    """Return plans as a table, in the order in which they were made; random ones as one row."""
    shown = [row for row in rows if not row.plan.startswith(_RANDOM)]
    drawn = [row for row in rows if row.plan.startswith(_RANDOM)]
    names = [row.plan for row in shown]
    several = [[row] for row in shown]
    if drawn:
        several.append(drawn)
        names.append(f"random, mean and spread of {len(drawn)}")
    predicted = [fmean(row.predicted_kl for row in each) for each in several]
    kl = [_mean([row.measured_kl for row in each]) for each in several]
    errors = [_spread(each) for each in several]
    digits = digits_for([*predicted, *(each for each in kl if each is not None)])
    columns = [
        Column("plan", names, "label"),
        Column("bits", [f"{fmean(row.bits for row in each):.3f}" for each in several]),
        Column("MB", [f"{fmean(row.bytes for row in each) / 1e6:.1f}" for each in several], rank=3),
    ]
    if any(row.ms is not None for row in rows):
        times = [_mean([row.ms for row in each]) for each in several]
        cells = ["" if each is None else f"{each:.2f}" for each in times]
        columns.append(Column("ms", cells, rank=2))
    columns.append(Column("KL predicted", nats(predicted, digits)))
    if any(row.measured_kl is not None for row in rows):
        columns += [
            Column("KL", nats(kl, digits)),
            Column("+-", nats(errors, digits)),
            Column("regret", nats([_mean([r.regret for r in e]) for e in several], digits), rank=1),
        ]
    notes = [
        "KL: nats a token, from the dense model; predicted: the sum of what linears cost alone; "
        "+-: standard error; regret: above the least that was measured; bits: a value of all block "
        "linears' weights, scales included, dense being 16",
        *found.notes,
    ]
    return TextTable(title, columns, notes)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [each for each in values if each is not None]
    return fmean(known) if known else None


def _spread(rows: Sequence[PlanRow]) -> float | None:
    if len(rows) == 1:
        return rows[0].kl_se
    known = [row.measured_kl for row in rows if row.measured_kl is not None]
    return stdev(known) if len(known) > 1 else None


def _verdict(rows: Sequence[PlanRow], found: Search) -> list[str]:
    """Say what the first plan is worth."""
    best = rows[0]
    if best.measured_kl is None:
        return [
            f"{found.budget}: {in_nats(best.predicted_kl)} KL a token predicted, at "
            f"{best.bits:.3f} bits",
            "next: --verify 3 measures it, and what it has to beat",
        ]
    said = []
    others = [row for row in rows if not row.plan.startswith(("plan", _RANDOM))]
    uniform = [row for row in others if row.plan.startswith("uniform")]
    for group, name in ((uniform, "best uniform one"), (others, "best of all others")):
        if group:
            rival = min(group, key=lambda row: row.measured_kl or 0.0)
            said.append(_against(best, rival, f"the {name}, {rival.plan}"))
    if best.measured_kl:
        off = best.predicted_kl / best.measured_kl - 1
        side = "above" if off > 0 else "below"
        said.append(f"the prediction is {abs(off):.0%} {side} what was measured")
    return said


def _against(best: PlanRow, rival: PlanRow, name: str) -> str:
    assert best.measured_kl is not None
    assert rival.measured_kl is not None
    if best.select == rival.select:
        return f"{best.plan} is {name}"
    difference = rival.measured_kl - best.measured_kl
    error = math.hypot(best.kl_se or 0.0, rival.kl_se or 0.0)
    share = f"{best.plan} costs {best.measured_kl / rival.measured_kl:.2f} of {name}"
    sizes = f"at {best.bits:.3f} bits to its {rival.bits:.3f}"
    if difference < 0 or is_nothing(difference, error):
        return f"{share}, {sizes}: no better by two errors ({in_nats(ERRORS * error)})"
    return f"{share}, {sizes}: {in_nats(difference)} less"


def _draw(rows: Sequence[PlanRow], found: Search, title: str, path: Path) -> None:
    """Draw KL against bits, and against milliseconds where plans were timed."""
    kinds = ["bits"] + (["ms"] if all(row.ms is not None for row in rows) else [])
    figure = Figure(figsize=(6.4 * len(kinds), 4.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        _curve(axes, found, kind)
        _points(axes, rows, kind)
        axes.set_yscale("log")
        axes.set_ylabel("KL, nats a token")
        axes.set_xlabel(
            "bits a weight of block linears, scales included" if kind == "bits" else "ms of linears"
        )
    figure.axes[0].legend(fontsize=7)
    title_over(figure, title)
    save(figure, path)


def _curve(axes: Axes, found: Search, kind: str) -> None:
    """Draw what the best plans are predicted to cost, from the cheapest to the dearest."""
    budgets = Budget(kind, 1.0)
    least, most = (
        sum(pick(map(budgets.cost, item.choices)) for item in found.items) for pick in (min, max)
    )
    limit = budgets.limit(found.items)
    points = []
    for step in range(1, _CURVE):
        share = least + (most - least) * (step / _CURVE) ** 2
        (plan,) = solve(found.items, Budget(kind, share / limit))
        points.append((plan.bits if kind == "bits" else plan.us / 1000, plan.kl))
    x, y = zip(*(point for point in points if point[1] > 0), strict=True)
    axes.plot(x, y, color="#777777", linewidth=1, label="best, predicted")


def _points(axes: Axes, rows: Sequence[PlanRow], kind: str) -> None:
    """Draw what was measured, with two standard errors; the axis ends soon after."""
    groups: dict[str, list[PlanRow]] = {}
    for row in rows:
        if row.measured_kl:
            name = (
                row.plan.rsplit(" ", 1)[0] if row.plan.startswith((_RANDOM, "plan ")) else row.plan
            )
            groups.setdefault(name, []).append(row)
    for number, (name, group) in enumerate(groups.items()):
        x = [row.bits if kind == "bits" else row.ms or 0.0 for row in group]
        y = [row.measured_kl or 0.0 for row in group]
        error = [ERRORS * (row.kl_se or 0.0) for row in group]
        color, marker = COLORS[number % 8], MARKERS[(number + number // 8) % 8]
        axes.errorbar(x, y, error, label=name, color=color, fmt=marker, markersize=5, capsize=2)
    shown = [row.bits if kind == "bits" else row.ms or 0.0 for row in rows]
    axes.set_xlim(0.95 * min(shown), _BEYOND * max(shown))
