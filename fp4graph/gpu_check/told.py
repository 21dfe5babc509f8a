"""What a check found, as sentences and tables for people, and as JSON for the file."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fp4graph.gpu_check.speed import best_over_dense
from fp4graph.tables import Column, TextTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fp4graph.gpu_check.cuts import Tuned
    from fp4graph.gpu_check.found import Found
    from fp4graph.gpu_check.speed import Speed

NO_GPU = "no GPU: nothing measured"


def verdict(found: Found) -> list[str]:
    """Return what a check means, a sentence each."""
    if not found.is_measured:
        return [NO_GPU]
    said = [*_rightness(found), *_tuning(found.rows["cuts"]), *_speed(found.rows["times"])]
    said += _model(found.rows["model"])
    said += [f"{step}: {len(each)} failed; first {each[0]}" for step, each in found.errors.items()]
    said += [f"{step}: no time for {len(each)}" for step, each in found.left_out.items()]
    return said


def to_json(found: Found) -> dict[str, Any]:
    """Return all that a check found, a key each step, as the file has it."""
    head = {"gpu_check": 1, "when": found.when, "measured": found.is_measured}
    steps = {step: [_fields(row) for row in rows] for step, rows in found.rows.items()}
    rest = {"left_out": found.left_out, "errors": found.errors, "seconds": found.seconds}
    return {
        **head, "environment": found.environment, **steps, **rest, "verdict": verdict(found)
    }  # fmt: skip


def _fields(row: Any) -> dict[str, Any]:
    judged = {name: getattr(row, name) for name in ("ok", "found") if hasattr(row, name)}
    return asdict(row) | judged


def _rightness(found: Found) -> Iterator[str]:
    rows, seeded = found.rows["exact"], found.rows["faults"]
    wrong = [row for row in rows if not row.ok]
    if rows:
        yield f"{len(rows) - len(wrong)} of {len(rows)} results equal float64 within rounding"
    for row in wrong[:3]:
        what = f"{row.of_bound:.3g} times its bound" if row.repeats else "not the same twice"
        yield f"WRONG: {row.kernel} {row.format} {row.dtype} {row.shape}, {row.rows} rows: {what}"
    unseen = [row for row in seeded if not row.found]
    if seeded:
        yield f"{len(seeded) - len(unseen)} of {len(seeded)} seeded faults were found"
    for row in unseen[:3]:
        yield f"NOT FOUND: {row.kernel} {row.format}, {row.rows} rows, {row.fault}"


def _tuning(rows: Sequence[Tuned]) -> Iterator[str]:
    better = [row for row in rows if row.cut is not None]
    if rows:
        most = f", at most {max(row.gain for row in better):.2f} times" if better else ""
        yield f"{len(better)} of {len(rows)} cuts were found faster{most}; they are kept"


def _speed(rows: Sequence[Speed]) -> Iterator[str]:
    best = best_over_dense(rows)
    if not best:
        return
    listed = ", ".join(f"{speed:.2f} at {count}" for count, speed in best.items())
    yield f"times as fast as dense by rows of x, the median over shapes: {listed}"
    slow = [count for count, speed in best.items() if speed < 1]
    if slow:
        yield f"slower than dense from {min(slow)} rows on"
    reads = [row.of_read for row in rows if row.rows == 1 and row.is_w4a16 and row.of_read]
    if reads:
        yield f"one row reads weights at {statistics.median(reads):.0%} of a plain read's bandwidth"


def _model(rows: Sequence[Any]) -> Iterator[str]:
    for row in rows:
        if row.ratio is not None:
            ratio = row.ratio["decode"]
            yield (
                f"a whole model decodes {ratio.median:.2f} times as fast with `{row.selector}` "
                f"in {row.format} ({ratio.low:.2f} to {ratio.high:.2f})"
            )


def tables(found: Found) -> Iterator[TextTable]:
    """Yield the tables of what was timed."""
    if tuned := found.rows["cuts"]:
        yield TextTable(
            "cuts of the fragment kernel's work",
            [
                Column("weight", [row.shape for row in tuned], "text"),
                Column("rows", [str(row.rows) for row in tuned]),
                Column("us", [f"{row.us:.1f}" for row in tuned]),
                Column("times faster", [f"{row.gain:.2f}" for row in tuned]),
                Column("best", [row.best for row in tuned], "text", 1),
                Column("chosen", [row.chosen for row in tuned], "text", 2),
            ],
        )
    if found.rows["times"]:
        yield table_of_speeds(found.rows["times"], "one linear, weights cold, bfloat16")


def table_of_speeds(rows: Sequence[Speed], title: str) -> TextTable:
    """Return what was timed; why something was not stands below."""
    timed = [row for row in rows if row.us is not None]
    reasons = dict.fromkeys(f"{row.variant}: {row.reason}" for row in rows if row.reason)
    return TextTable(
        title,
        [
            Column("weight", [row.shape for row in timed], "text"),
            Column("rows", [str(row.rows) for row in timed]),
            Column("variant", [row.variant for row in timed], "label"),
            Column("us", [f"{row.us:.1f}" for row in timed]),
            Column("quartiles", [_range(row.quartiles_us) for row in timed], "number", 3),
            Column("GB/s", [f"{row.gb_per_s:.0f}" for row in timed], "number", 2),
            Column("of read", [f"{row.of_read:.0%}" for row in timed], "number", 1),
            Column("x F.linear", [f"{row.over_dense:.2f}" for row in timed]),
        ],
        list(reasons),
    )


def _range(quartiles: tuple[float, float] | None) -> str:
    return "" if quartiles is None else f"{quartiles[0]:.1f} to {quartiles[1]:.1f}"
