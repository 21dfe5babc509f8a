"""Scores and sums as tables: sensitivity and outliers beside what was measured, and additivity."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING

from fp4graph import StudyError
from fp4graph.linears.tags import Role
from fp4graph.study import verdicts, views
from fp4graph.study.additivity import pairs, sets
from fp4graph.study.correlation import correlate
from fp4graph.study.plot_scores import draw_cells, draw_points
from fp4graph.study.sensitivity import PREDICTORS
from fp4graph.study.table import Table
from fp4graph.study.trial import mode_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fp4graph.study.additivity import SetRow
    from fp4graph.study.correlation import Correlation
    from fp4graph.study.measured import Measured
    from fp4graph.study.outliers import OutlierRow
    from fp4graph.study.sensitivity import Sensitivity, SensitivityRow

_STATISTICS = ("p999", "max", "ratio", "kurtosis", "rms")
_MANY = 30


def sensitivity_table(
    found: Sensitivity, settings: Sequence[Measured], title: str, *, compared: bool
) -> Table:
    """Return scores as a table, and how well they tell what was measured if that is asked for."""
    words = verdicts.of_sensitivity(found.rows)
    if found.left_out:
        reason = "its weight is made in the graph, or it tells on no logit"
        words += [f"left out: {path}: {reason}" for path in found.left_out]
    words.append(f"cost: {found.forwards:.1f} runs of the dense model over the text")
    more = []
    if compared:
        rows = _compared(found.rows, settings)
        heading = "the scores against measured trials of one linear"
        said = verdicts.of_correlations(rows, "scores")
        more = [Table(rows, views.of_correlations(rows, heading), said)]

    def draw(path: Path) -> None:
        _draw_sensitivity(found.rows, settings, title, path)

    return Table(found.rows, views.of_sensitivity(found.rows, title), words, more, draw)


def _compared(rows: Sequence[SensitivityRow], settings: Sequence[Measured]) -> list[Correlation]:
    roles = {row.path: row.role for row in rows}
    found = []
    for setting in settings:
        how = (setting.format, setting.activations, setting.quantizer)
        own = [row for row in rows if (row.format, row.activations, row.quantizer) == how]
        names = (*PREDICTORS, "dnll")
        predictors = {name: {row.path: getattr(row, name) for row in own} for name in names}
        found += correlate(predictors, setting, roles)
    return found


def _draw_sensitivity(
    rows: Sequence[SensitivityRow], settings: Sequence[Measured], title: str, path: Path
) -> None:
    """Draw every score over the measured damage, or, without any, one score by role and block."""
    settings = [each for each in settings if len(each.singles) > 1]
    if not settings:
        cells: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
        for row in rows:
            if row.block is not None:
                cells[_how(row)][row.role, row.block] = row.kl
        draw_cells(cells, "KL, estimated, nats a token", title, path)
        return
    panels = {}
    for setting in settings:
        own = [row for row in rows if _how(row) == _how(setting) and row.path in setting.singles]
        points = [(row.kl, setting.singles[row.path].kl, row.role) for row in own]
        if points:
            panels[f"{_how(setting)}, {setting.corpus}"] = points
    draw_points(panels, "KL, estimated, nats a token", "KL, measured, nats a token", title, path)


def _how(what: SensitivityRow | Measured) -> str:
    return f"{what.format} {mode_of(what.format, what.activations)} {what.quantizer}"


def outliers_table(
    rows: Sequence[OutlierRow], settings: Sequence[Measured], title: str, *, compared: bool
) -> Table:
    """Return outliers as a table, and how they go with what was measured if that is asked for.

    With and without `down`: 2603.08747 takes outliers to explain `down` and nothing else.
    """
    more = []
    if compared:
        found = _outliers_compared(rows, settings)
        heading = "outliers against measured trials of one linear"
        said = verdicts.of_correlations(found, "outliers")
        more = [Table(found, views.of_correlations(found, heading), said)]

    def draw(path: Path) -> None:
        cells = {(row.role, row.block): row.input.ratio for row in rows if row.block is not None}
        draw_cells({"inputs": cells}, "max over P99.9 of inputs", title, path)

    return Table(rows, views.of_outliers(rows, title), verdicts.of_outliers(rows), more, draw)


def _outliers_compared(
    rows: Sequence[OutlierRow], settings: Sequence[Measured]
) -> list[Correlation]:
    roles = {row.path: row.role for row in rows}
    predictors = {
        f"{what} {name}": {row.path: float(asdict(row)[what][name]) for row in rows}
        for what in ("input", "weight")
        for name in _STATISTICS
    }
    return [
        score
        for setting in settings
        for without in (None, Role.DOWN)
        for score in correlate(predictors, setting, roles, without)
    ]


def additivity_table(found: Sequence[Measured], model: str) -> Table:
    """Return sets beside sums; interactions of pairs belong to it.

    Raises:
        StudyError: there is nothing to compare; says what is lacking.
    """
    tables, drawn = [], {}
    for setting in found:
        whole, two = sets(setting), pairs(setting)
        title = f"{model}, {_how(setting)}, {setting.corpus}"
        more = [Table(two, views.of_pairs(two, title))] if two else []
        if whole:
            drawn[title] = [(row.kl_sum, row.kl, _size(row)) for row in whole]
        if whole or two:
            tables.append(Table(whole, views.of_sets(whole, title), verdicts.of_sets(whole), more))
    if not tables:
        raise StudyError(_lacking(found))

    def draw(path: Path) -> None:
        names = "sum of the linears' own KL, nats a token", "KL of the set, nats a token"
        draw_points(drawn, *names, f"{model}: do damages add up?", path, equal=True)

    first, *others = tables
    return Table(first.rows, first.view, first.verdict, [*first.more, *others], draw)


def _lacking(found: Sequence[Measured]) -> str:
    singles = sum(len(setting.singles) for setting in found)
    several = sum(len(setting.trials) for setting in found) - singles
    if not singles and not several:
        return "nothing to compare: the results have no trial of this model"
    if not several:
        return (
            "nothing to compare: there is no trial of several linears, only of single ones; "
            "measure some, such as `ablate --select attn` with the same text and --out"
        )
    if not singles:
        return (
            "nothing to compare: there is no trial of a single linear; "
            "`ablate --plan grid` with the same text and --out measures all"
        )
    return (
        "nothing to compare: no set has a trial of each of its linears on the same text and in the "
        "same format; `ablate --plan grid` with the same text and --out measures all"
    )


def _size(row: SetRow) -> str:
    return f"2 to {_MANY - 1} linears" if row.linears < _MANY else f"{_MANY} and more"
