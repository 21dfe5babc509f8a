"""How people read the rows of each study: which columns, in which order, and what they are in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp4graph.study.outliers import by_role
from fp4graph.study.trial import mode_of
from fp4graph.tables import Column, TextTable, digits_for, nats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp4graph.study.additivity import PairRow, SetRow
    from fp4graph.study.correlation import Correlation
    from fp4graph.study.latency import LatencyRow, Ratio
    from fp4graph.study.outliers import OutlierRow, Outliers
    from fp4graph.study.sensitivity import SensitivityRow
    from fp4graph.study.tasks import TaskRow
    from fp4graph.study.trial import OfTrial, Row

SHOWN = 40
ENDS = 12
ERRORS = 2.0
NOTHING = "~"
"""Stands behind a number that is within two standard errors of 0."""


def is_nothing(value: float, error: float | None) -> bool:
    """Whether a number is within two standard errors of 0."""
    return error is not None and abs(value) < ERRORS * error


def _how(rows: Sequence[OfTrial]) -> list[Column]:
    """Return the columns of how each row's linears run; empty for the dense model."""
    modes = ["" if row.is_dense else row.activation_mode for row in rows]
    return [
        Column("format", [row.format or "" for row in rows], "text"),
        Column("mode", modes, "text"),
        Column("quantizer", ["" if row.is_dense else row.quantizer for row in rows], "text"),
    ]


def of_ablation(rows: Sequence[Row], title: str) -> TextTable:
    """Return trials as a table: the dense model, then the most damaging first, by KL."""
    dense = [row for row in rows if row.is_dense]
    trials = sorted((row for row in rows if not row.is_dense), key=lambda row: -row.kl)
    shown = [*dense, *trials[:SHOWN]]
    digits = digits_for([row.kl for row in shown])
    marked = any(is_nothing(row.dnll, row.dnll_se) for row in trials[:SHOWN])
    dnll = [
        text + (NOTHING if not row.is_dense and is_nothing(row.dnll, row.dnll_se) else " " * marked)
        for text, row in zip(
            nats([row.dnll for row in shown], digits, signed=True), shown, strict=True
        )
    ]
    columns = [
        Column("FP4 in", [row.label for row in shown], "label"),
        *_how(shown),
        Column("KL", nats([row.kl for row in shown], digits)),
        Column("+-", nats([row.kl_se for row in shown], digits)),
        Column("dNLL", dnll, rank=1),
        Column("+-", nats([row.dnll_se for row in shown], digits), rank=1),
        Column("ppl", ["> 1e308" if r.ppl is None else f"{r.ppl:.3f}" for r in shown], rank=4),
        Column("top-1", [f"{row.top1:.1%}" for row in shown], rank=2),
        Column("KL p99", [f"{row.kl_p99:.3f}" for row in shown], rank=7),
        Column("Mparam", [f"{row.parameters / 1e6:.1f}" for row in shown], rank=6),
        Column("KL/MB", ["" if r.kl_per_mb is None else f"{r.kl_per_mb:.5f}" for r in shown],
               rank=5),
    ]  # fmt: skip
    if any(row.probe is not None for row in shown):
        cells = ["" if row.probe is None else f"{row.probe:.1%}" for row in shown]
        columns.append(Column("probe", cells, rank=3))
    notes = [
        "KL, dNLL: nats a token, from the dense model on the same tokens; +-: standard error, "
        "windows being independent; KL p99: 99 % of tokens are below; KL/MB: for 10^6 bytes saved"
    ]
    if marked:
        notes.append(f"{NOTHING}: within two standard errors of 0; KL tells trials apart, not dNLL")
    if dense and dense[0].noise is not None:
        notes.append(
            f"text noise: the two halves of this text differ by {dense[0].noise:.4f} +- "
            f"{dense[0].noise_se:.4f} for the dense model itself; this is not the error of dNLL"
        )
    if dense and dense[0].dnll_se is None:
        notes.append("one window gives no error: take more --tokens or a smaller --seq-len")
    if len(trials) > SHOWN:
        notes.append(f"the {SHOWN} most damaging of {len(trials)} trials; the JSON lines have all")
    return TextTable(title, columns, notes)


def of_sensitivity(rows: Sequence[SensitivityRow], title: str) -> TextTable:
    """Return scores as a table: both ends of the list, the most sensitive first."""
    ordered = sorted(rows, key=lambda row: -row.kl)
    left = len(ordered) - 2 * ENDS
    shown = ordered if left <= 0 else [*ordered[:ENDS], *ordered[-ENDS:]]
    columns = [
        Column("linear", [f"{row.role},blocks={row.block}" for row in shown], "label"),
        Column("format", [row.format for row in shown], "text"),
        Column("mode", [mode_of(row.format, row.activations) for row in shown], "text"),
        Column("quantizer", [row.quantizer for row in shown], "text"),
        Column("KL", [f"{row.kl:.3g}" for row in shown]),
        Column("dNLL", [f"{row.dnll:+.3g}" for row in shown], rank=2),
        Column("SQNR dB", [f"{row.sqnr:.1f}" for row in shown], rank=1),
        Column("Fisher", [f"{row.fisher:.3g}" for row in shown], rank=3),
        Column("KL by element", [f"{row.kl_element:.3g}" for row in shown], rank=6),
        Column("by token", [f"{row.kl_token:.3g}" for row in shown], rank=5),
        Column("by window", [f"{row.kl_window:.3g}" for row in shown], rank=4),
    ]
    if left > 0:
        columns = [
            Column(c.name, [*c.cells[:ENDS], "", *c.cells[ENDS:]], c.kind, c.rank) for c in columns
        ]
        gap = f"... {left} between ..."
        columns[0] = Column("linear", [each or gap for each in columns[0].cells], "label")
    notes = ["KL, dNLL: nats a token, estimated; by element, token, window: what is summed first"]
    return TextTable(title, columns, notes)


def of_outliers(rows: Sequence[OutlierRow], title: str) -> TextTable:
    """Return means over the linears of each role: of inputs, of weights."""
    roles = by_role(rows)

    def columns(what: str, each: Sequence[Outliers], rank: int) -> list[Column]:
        return [
            Column(f"{what}max/P99.9", [f"{one.ratio:.3g}" for one in each], rank=rank),
            Column(f"{what}kurtosis", [f"{one.kurtosis:.3g}" for one in each], rank=rank),
            Column(f"{what}max", [f"{one.max:.3g}" for one in each], rank=rank + 2),
            Column(f"{what}P99.9", [f"{one.p999:.3g}" for one in each], rank=rank + 3),
            Column(f"{what}RMS", [f"{one.rms:.3g}" for one in each], rank=rank + 4),
        ]

    inputs, weights = ([pair[which] for pair in roles.values()] for which in (0, 1))
    cells = [str(one.outlier_channels) for one in inputs]
    notes = [
        "inputs first, then weights: means over the linears of a role; outlier channels: input "
        "columns whose largest value is above 10 times the median column's"
    ]
    return TextTable(
        title,
        [
            Column("role", list(roles), "label"),
            *columns("", inputs, 1),
            Column("outlier channels", cells, rank=2),
            *columns("weight ", weights, 2),
        ],
        notes,
    )


def of_correlations(rows: Sequence[Correlation], title: str) -> TextTable:
    """Return how well scores tell what was measured."""
    columns = [
        Column("predictor", [row.predictor for row in rows], "label"),
        Column("measured", [row.target for row in rows], "text"),
        Column("Spearman", [f"{row.spearman:.3f}" for row in rows]),
        Column("95 %", [_interval(row.spearman_low, row.spearman_high) for row in rows], rank=1),
        Column("Pearson", [f"{row.pearson:.3f}" for row in rows], rank=2),
        Column("95 %", [_interval(row.pearson_low, row.pearson_high) for row in rows], rank=3),
        Column("linears", [str(row.linears) for row in rows], rank=4),
        Column("without", [row.without or "" for row in rows], "text"),
        Column("format", [row.format for row in rows], "text"),
        Column("mode", [row.activation_mode for row in rows], "text"),
        Column("quantizer", [row.quantizer for row in rows], "text"),
        Column("text", [row.corpus for row in rows], "text"),
    ]
    notes = ["95 % intervals: linears drawn with repeats"]
    if not rows:
        notes = ["nothing to compare: the results have fewer than five trials of one linear"]
    return TextTable(title, columns, notes)


def _interval(low: float, high: float) -> str:
    return f"[{low:.3f}, {high:.3f}]"


def of_sets(rows: Sequence[SetRow], title: str) -> TextTable:
    """Return sets beside the sums of their linears."""
    shown = rows[:SHOWN]
    digits = digits_for([row.kl for row in shown])
    columns = [
        Column("set", [row.name for row in shown], "label"),
        Column("linears", [str(row.linears) for row in shown], rank=1),
        Column("KL", nats([row.kl for row in shown], digits)),
        Column("sum", nats([row.kl_sum for row in shown], digits)),
        Column("ratio", [_over(row.kl, row.kl_sum) for row in shown]),
        Column("dNLL", nats([row.dnll for row in shown], digits, signed=True), rank=3),
        Column("+-", nats([row.dnll_se for row in shown], digits), rank=3),
        Column("sum", nats([row.dnll_sum for row in shown], digits, signed=True), rank=4),
        Column("ratio", [_over(row.dnll, row.dnll_sum) for row in shown], rank=5),
    ]
    notes = ["sum: of each linear's own trial; ratio: measured over sum"]
    return TextTable(title, columns, notes)


def of_pairs(rows: Sequence[PairRow], title: str) -> TextTable:
    """Return interactions, the largest first."""
    shown = rows[:SHOWN]
    digits = digits_for([row.kl for row in shown])
    columns = [
        Column("one", [row.first for row in shown], "label"),
        Column("other", [row.second for row in shown], "label"),
        Column("KL of both", nats([row.kl for row in shown], digits)),
        Column("above the sum", nats([row.kl_interaction for row in shown], digits, signed=True)),
        Column("dNLL of both", nats([row.dnll for row in shown], digits, signed=True), rank=1),
        Column(
            "above it", nats([row.dnll_interaction for row in shown], digits, signed=True), rank=2
        ),
    ]
    return TextTable(f"{title}: the largest interactions", columns)


def _over(value: float, total: float) -> str:
    return f"{value / total:.2f}" if total else ""


def of_latency(rows: Sequence[LatencyRow], title: str) -> TextTable:
    """Return variants, the dense one first; ratios lead."""
    times = [row.per_token_ms for row in rows]
    columns = [
        Column("FP4 in", [row.label for row in rows], "label"),
        *_how(rows),
        Column("decode ratio", [_ratio(row.ratio, "decode") for row in rows]),
        Column("prefill ratio", [_ratio(row.ratio, "prefill") for row in rows], rank=1),
        Column("tok/s", [f"{row.decode_tokens_per_s:.2f}" for row in rows], rank=2),
        Column("TTFT ms", [f"{row.ttft_s * 1e3:.1f}" for row in rows], rank=3),
        *(
            Column(f"{name} ms", [f"{each[name]:.1f}" for each in times], rank=rank)
            for name, rank in (("p50", 6), ("p90", 9), ("p99", 8))
        ),
        Column("MB", [f"{row.weight_bytes / 1e6:.1f}" for row in rows], rank=5),
        Column("GB/s", [f"{row.gb_per_s:.2f}" for row in rows], rank=4),
        Column("compile s", [f"{row.compile_s:.1f}" for row in rows], rank=7),
        *(
            Column(name, ["" if each is None else f"{each / 1e6:.0f}" for each in sizes], rank=rank)
            for name, sizes, rank in (
                ("RSS MB", [row.resident_rss for row in rows], 4),
                ("peak MB", [row.peak_rss for row in rows], 5),
            )
            if any(sizes)
        ),
    ]
    recompiles = sum(row.recompiles for row in rows)
    breaks = sum(row.graph_breaks for row in rows)
    notes = [
        "ratio: times faster than dense, median of paired times [95 % bootstrap interval]; MB and "
        "GB/s: linear weights read; RSS and peak: of a process with this variant alone, "
        "between generations and since its start; "
        f"{recompiles} recompiles after warm-up, {breaks} graph breaks"
    ]
    return TextTable(title, columns, notes)


def _ratio(ratios: dict[str, Ratio] | None, phase: str) -> str:
    if ratios is None:
        return "1"
    ratio = ratios[phase]
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def of_tasks(rows: Sequence[TaskRow], title: str) -> TextTable:
    """Return trials by task, metric and filter."""
    above = [None if row.is_dense else row.difference for row in rows]
    errors = [None if row.is_dense else row.difference_se for row in rows]
    marked = [
        "" if value is None else f"{value:+.4f}{NOTHING if is_nothing(value, error) else ' '}"
        for value, error in zip(above, errors, strict=True)
    ]
    columns = [
        Column("FP4 in", [row.label for row in rows], "label"),
        *_how(rows),
        Column("task", [row.task for row in rows], "text"),
        Column("metric", [row.metric for row in rows], "text"),
        Column("filter", [row.filter for row in rows], "text", rank=2),
        Column("value", ["" if row.value is None else f"{row.value:.4f}" for row in rows]),
        Column("above dense", marked),
        Column("+-", ["" if error is None else f"{error:.4f}" for error in errors]),
        Column("questions", [str(row.questions) for row in rows], rank=1),
        Column("note", [row.note for row in rows], "text", rank=3),
    ]
    notes = (
        [f"{NOTHING}: within two standard errors of 0"] if any(NOTHING in m for m in marked) else []
    )
    return TextTable(title, columns, notes)
