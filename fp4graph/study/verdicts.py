"""What the rows of a study mean, in sentences: which linears do the damage, what it is worth."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import accumulate
from typing import TYPE_CHECKING

from fp4graph.study.outliers import by_role
from fp4graph.study.selections import cell_of, kind_of, shortest
from fp4graph.study.trial import mode_of
from fp4graph.study.views import is_nothing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp4graph.study.additivity import SetRow
    from fp4graph.study.correlation import Correlation
    from fp4graph.study.latency import LatencyRow
    from fp4graph.study.outliers import OutlierRow
    from fp4graph.study.selections import Cell
    from fp4graph.study.sensitivity import SensitivityRow
    from fp4graph.study.tasks import TaskRow
    from fp4graph.study.trial import Row

_LARGE = 0.3  # of the damage: as many linears as make up so much are named
_SMALL = 0.1  # and as many as cost no more than this are called safe
_ROUNDING = 1e-9
_NAMED = 6  # linears that are named at most
_MANY = 20  # cells from which on shares are worth a sentence
_CLOSE = 0.15  # by which sums may be wrong and still be added up
_GOOD, _FAIR = 0.9, 0.7  # correlations of ranks


def nats(value: float) -> str:
    """Return a number of nats with two digits that count."""
    if abs(value) >= 1:
        return f"{value:.2f} nats"
    digits = 4 if not value else min(max(1 - math.floor(math.log10(abs(value))), 2), 7)
    return f"{value:.{digits}f} nats"


def of_ablation(rows: Sequence[Row], left: int = 0) -> list[str]:
    """Say what trials came to, setting by setting.

    Args:
        rows: the trials, the dense model's among them.
        left: how many trials were not run for lack of time.
    """
    settings: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if not row.is_dense:
            settings[row.format or "", row.activation_mode, row.quantizer, row.direction].append(
                row
            )
    said = []
    for (format, mode, quantizer, direction), found in settings.items():
        how = f"{format} {mode}" + ("" if quantizer == "rtn" else f" {quantizer}")
        said += [f"{how}: {each}" for each in _of_setting(found, direction)]
    if left:
        said.append(f"{left} trials are left: the same command goes on with them")
    elif said:
        said.append(_next(rows))
    return said


def _of_setting(rows: Sequence[Row], direction: str) -> list[str]:
    said = []
    whole = max(rows, key=lambda row: row.linears)
    if whole.selector == "all" or len(rows) == 1:
        said.append(_of_one(whole))
    cells = {
        cell: row.kl for row in rows if direction == "only" and (cell := cell_of(row.selector))
    }
    if len(cells) >= _MANY:
        said += of_cells(cells, "damage of single linears")
        said += _of_ratios([row.kl / total for row in rows if (total := _sum(row, cells))])
    others = [row for row in rows if not cell_of(row.selector) and row.selector != "all"]
    if len(others) > 1 and direction == "only":
        worst, least = (pick(others, key=lambda row: row.kl) for pick in (max, min))
        said.append(
            f"`{worst.label}` costs most ({nats(worst.kl)} KL), "
            f"`{least.label}` least ({nats(least.kl)})"
        )
    unclear = [row for row in rows if is_nothing(row.kl, row.kl_se)]
    if unclear:
        said.append(f"{len(unclear)} of {len(rows)} trials cost nothing that this text can show")
    return said


def _sum(row: Row, cells: Mapping[Cell, float]) -> float | None:
    """Return what the linears of a role, a block or `all` cost alone; None if not all are known."""
    kind, name = kind_of(row.selector), row.selector
    own = [
        kl
        for (role, block), kl in cells.items()
        if (kind == "role" and role == name)
        or (kind == "block" and f"blocks={block}" == name)
        or name == "all"
    ]
    return sum(own) if len(own) == row.linears else None


def _of_one(row: Row) -> str:
    worse = math.expm1(min(row.dnll, 100.0))
    error = "" if row.dnll_se is None else f" +- {row.dnll_se * (1 + worse):.1%}"
    return (
        f"`{row.label}` costs {nats(row.kl)} KL a token; perplexity {worse:+.1%}{error}; "
        f"{1 - row.top1:.1%} of tokens have another first choice"
    )


def of_cells(cells: Mapping[Cell, float], what: str) -> list[str]:
    """Say which linears make up much of a sum, and how many hardly any of it.

    Args:
        cells: KL by role and block.
        what: what is added up.
    """
    ordered = sorted(cells, key=lambda cell: -cells[cell])
    total = sum(cells.values())
    if total <= 0:
        return []
    sums = list(accumulate(cells[cell] for cell in ordered))
    worst = ordered[
        : 1 + next(i for i, each in enumerate(sums) if each >= _LARGE * total - _ROUNDING)
    ]
    rest = [total - each for each in sums]
    kept = next(i for i, each in enumerate(rest) if each <= _SMALL * total + _ROUNDING) + 1
    safe = ordered[kept:]
    share = f"{sums[len(worst) - 1] / total:.0%} of the {what} ({nats(total)} in all)"
    if len(worst) > _NAMED:
        first = f"the {len(worst)} most damaging of {len(cells)} linears"
        said = [f"{first}, {_named(worst[:_NAMED])} before others, make up {share}"]
    else:
        said = [f"{_named(worst)} {'makes' if len(worst) == 1 else 'make'} up {share}"]
    if safe:
        said.append(
            f"the {len(safe)} least damaging of {len(cells)} linears cost "
            f"{nats(sum(cells[cell] for cell in safe))} together if damages add up: "
            f'--select "{shortest(safe, cells)}"'
        )
    return said


def _named(cells: Iterable[Cell]) -> str:
    """Return linears for people: `` `down` of blocks 2, 11, 29 and `v` of block 0 ``."""
    roles: dict[str, list[int]] = defaultdict(list)
    for role, block in cells:
        roles[role].append(block)
    return " and ".join(
        f"`{role}` of block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, sorted(blocks)))}"
        for role, blocks in roles.items()
    )


def _next(rows: Sequence[Row]) -> str:
    selectors = [row.selector for row in rows if not row.is_dense]
    if sum(cell_of(each) is not None for each in selectors) >= _MANY:
        return "next: measure a mix of your own, --select or --mix; see it by `fp4graph show OUT`"
    if len(selectors) == 1:
        return "next: which linears do it: --by role, or `fp4graph sensitivity MODEL` for all"
    return "next: `fp4graph sensitivity MODEL` scores every linear; --plan grid measures each"


def of_sensitivity(rows: Sequence[SensitivityRow]) -> list[str]:
    """Say which linears are sensitive, and which are safe, setting by setting."""
    settings: dict[str, dict[Cell, float]] = defaultdict(dict)
    for row in rows:
        if row.block is not None:
            how = f"{row.format} {mode_of(row.format, row.activations)}"
            how += "" if row.quantizer == "rtn" else f" {row.quantizer}"
            settings[how][row.role, row.block] = row.kl
    said = []
    for how, cells in settings.items():
        said += [f"{how}: {each}" for each in of_cells(cells, "damage that is expected")]
    if said:
        said.append("next: measure that selection on another text: `fp4graph ablate MODEL`")
    return said


def of_sets(rows: Sequence[SetRow]) -> list[str]:
    """Say whether damages add up."""
    return _of_ratios([row.kl / row.kl_sum for row in rows if row.kl_sum > 0])


def _of_ratios(ratios: Sequence[float]) -> list[str]:
    if not ratios:
        return []
    low, high = min(ratios), max(ratios)
    off = max(abs(low - 1), abs(high - 1))
    text = f"sets cost {low:.2f} to {high:.2f} times the sum of their linears' own KL"
    if off <= _CLOSE:
        right = math.ceil(off * 100 - _ROUNDING)
        return [f"{text}: sums are right to {right} %, so damages may be added up"]
    if high < 1 - _CLOSE:
        text += (
            ", as in 16-bit dtypes, where rounding has a share in each trial's KL (not in float32)"
        )
    return [f"{text}: sums are wrong by up to {off:.0%}; measure a mix before you rely on it"]


def of_correlations(rows: Sequence[Correlation], what: str) -> list[str]:
    """Say whether scores tell what was measured: the best of them, by ranks of KL."""
    found = [row for row in rows if row.target == "kl" and row.without is None]
    if not found:
        return []
    best = max(found, key=lambda row: row.spearman)
    rank = best.spearman
    much = "well" if rank >= _GOOD else "fairly" if rank >= _FAIR else "hardly"
    return [
        f"{what} tell {much} which linears cost most: the best, `{best.predictor}`, has a rank "
        f"correlation of {rank:.2f} [{best.spearman_low:.2f}, {best.spearman_high:.2f}] with KL"
    ]


def of_latency(rows: Sequence[LatencyRow]) -> list[str]:
    """Say how much faster each variant decodes, where that is clear."""
    said = []
    for row in rows:
        if row.ratio is None:
            continue
        ratio = row.ratio["decode"]
        if ratio.low <= 1 <= ratio.high:
            said.append(f"`{row.label}`: no difference in decoding that {row.rounds} rounds show")
        else:
            faster = "faster" if ratio.median > 1 else "slower"
            times = ratio.median if ratio.median > 1 else 1 / ratio.median
            said.append(f"`{row.label}` decodes {times:.2f} times {faster} than dense")
    return said


def of_tasks(rows: Sequence[TaskRow]) -> list[str]:
    """Say how many differences are more than chance."""
    known = [row for row in rows if not row.is_dense and row.difference is not None]
    clear = [row for row in known if not is_nothing(row.difference or 0.0, row.difference_se)]
    if not known:
        return []
    if not clear:
        most = max(row.questions for row in known)
        return [f"no difference is beyond two standard errors; {most} questions show no smaller"]
    return [
        f"{len(clear)} of {len(known)} differences are beyond two standard errors: "
        + ", ".join(f"{row.task} {row.metric} {row.difference:+.3f}" for row in clear[:5])
    ]


def of_outliers(rows: Sequence[OutlierRow]) -> list[str]:
    """Say whose inputs reach farthest."""
    roles = {role: inputs.ratio for role, (inputs, _) in by_role(rows).items()}
    if not roles:
        return []
    worst = max(roles, key=lambda role: roles[role])
    channels = sum(row.input.outlier_channels > 0 for row in rows)
    return [
        f"inputs of `{worst}` reach farthest: their largest value is {roles[worst]:.0f} times what "
        f"99.9 % stay below; {channels} of {len(rows)} linears have outlier channels",
        "next: outliers alone do not tell the damage; `fp4graph sensitivity MODEL` does",
    ]
