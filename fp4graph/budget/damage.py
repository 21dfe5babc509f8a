"""What each linear costs alone in each scheme: as measured where it was, else as estimated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp4graph import StudyError
from fp4graph.study.estimates import to_scale

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp4graph import Scheme
    from fp4graph.linears.tags import LinearTag
    from fp4graph.study.measured import Measured
    from fp4graph.study.sensitivity import SensitivityRow


@dataclass(frozen=True)
class Damage:
    """What one linear costs alone.

    Attributes:
        kl: nats a token.
        error: its standard error.
        measured: whether a trial said so, and no estimate.
    """

    kl: float
    error: float
    measured: bool


def damages(
    scheme: Scheme,
    tags: Sequence[LinearTag],
    settings: Sequence[Measured],
    scores: Iterable[SensitivityRow],
) -> tuple[dict[LinearTag, Damage], str]:
    """Return what linears cost in a scheme, and a sentence that says where that is from.

    Estimates are those of the scheme, or of rounding to nearest where the quantizer needs data.
    Where five linears and more have both, estimates are multiplied by what makes their sums equal;
    else by the ratio of `all` under the two quantizers, where both were measured.

    Args:
        scheme: format, activations and quantizer.
        tags: the linears.
        settings: what was measured of the model.
        scores: estimates.

    Raises:
        StudyError: a linear has neither.
    """
    own = best_setting(settings, scheme)
    singles = {} if own is None else own.singles
    estimates = {row.path: row for row in scores if _is_of(row, scheme)}
    factor, how = _factor(scheme, tags, settings, own, estimates)
    found: dict[LinearTag, Damage] = {}
    for tag in tags:
        row, score = singles.get(tag.fqn), estimates.get(tag.fqn)
        if row is not None:
            found[tag] = Damage(row.kl, row.kl_se or 0.0, measured=True)
        elif score is not None:
            found[tag] = Damage(score.kl * factor, score.kl_se * factor, measured=False)
        else:
            raise StudyError(
                f"nothing says what {tag.fqn} costs in {scheme}: it has no trial in the store, and "
                "sensitivity does not score it"
            )
    count = sum(each.measured for each in found.values())
    said = (
        f"{scheme}: {count} of {len(found)} linears measured" if count else f"{scheme}: estimated"
    )
    return found, f"{said}{how if count < len(found) else ''}"


def best_setting(
    settings: Sequence[Measured], scheme: Scheme, quantizer: str = ""
) -> Measured | None:
    """Return the setting of a scheme with most single linears.

    Args:
        settings: what was measured of a model.
        scheme: format, activations and quantizer.
        quantizer: in place of the scheme's.
    """
    same = [
        each
        for each in settings
        if (each.format, each.activations, each.quantizer)
        == (str(scheme.format), str(scheme.activations), quantizer or str(scheme.quantizer))
    ]
    return max(same, key=lambda each: len(each.singles), default=None)


def _is_of(row: SensitivityRow, scheme: Scheme) -> bool:
    how = scheme.quantizer
    quantizer = "rtn" if how.needs_data or how.rotation else str(how)
    return (row.format, row.activations, row.quantizer) == (
        str(scheme.format),
        scheme.activations,
        quantizer,
    )


def _factor(
    scheme: Scheme,
    tags: Sequence[LinearTag],
    settings: Sequence[Measured],
    own: Measured | None,
    estimates: dict[str, SensitivityRow],
) -> tuple[float, str]:
    """Return what estimates are multiplied by, and how that is said."""
    singles = {} if own is None else own.singles
    ratio = to_scale(
        {path: row.kl for path, row in estimates.items()},
        {path: row.kl for path, row in singles.items()},
    )
    if ratio is not None:
        return ratio, f", the others estimated, times {ratio:.2f}"
    if not (scheme.quantizer.needs_data or scheme.quantizer.rotation):
        return 1.0, ""
    whole = frozenset(tag.fqn for tag in tags)
    nearest = best_setting(settings, scheme, "rtn")
    if own and nearest and whole in own.trials and whole in nearest.trials:
        ratio = own.trials[whole].kl / nearest.trials[whole].kl
        return ratio, f" as rounded to nearest, times {ratio:.2f}: what all of them measured"
    return 1.0, " as rounded to nearest, for nothing was measured"
