"""What a folder of results holds, as plain values for the page.

A cell is the linears of one role in one block: what a click turns on and off. Settings are formats
with activations and quantizers; each has a KL for every cell, measured or estimated.
"""

from __future__ import annotations

import base64
from math import fsum, hypot, isfinite
from typing import TYPE_CHECKING, Any

from fp4graph import StudyError, get_format
from fp4graph.page.rows import Beside, read_beside
from fp4graph.quantizers import Quantizer
from fp4graph.study import verdicts
from fp4graph.study.estimates import to_scale
from fp4graph.study.plot_style import in_model_order
from fp4graph.study.results import STORE, open_results, studies
from fp4graph.study.selections import cell_of
from fp4graph.study.trial import mode_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from fp4graph.page.rows import Rows
    from fp4graph.study.selections import Cell
    from fp4graph.study.store import Store, Stored
    from fp4graph.study.trial import Row

    Setting = tuple[str, str, str]  # format, activations, quantizer

_RECEIPT = ("date", "machine", "threads", "fp4graph", "torch", "transformers", "python", "command")


def gather(path: Path) -> dict[str, Any]:
    """Return what the page shows.

    Args:
        path: a folder of results, or its trials.sqlite. JSON lines of `sensitivity`, `outliers`,
            `latency` and `policy` in it are taken, whatever their names, and heads of calibrations.

    Raises:
        StudyError: there are no results; a file cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    trials = folder / STORE if path.is_dir() else path
    beside = read_beside(folder) if path.exists() else Beside()
    if not beside and not trials.is_file():
        raise StudyError(f"there are no results in {path}")
    found = []
    if trials.is_file():
        store = open_results(trials)
        for title, stored in studies(store.all()).values():
            found.append(_study(title, stored, beside, store))
        store.close()
    if not found:
        found.append(_study(folder.resolve().name, (), beside, None))
    found.reverse()  # what was measured last comes first
    return {
        "studies": found,
        "latency": beside.latency,
        "policy": beside.policy,
        "calibrations": beside.calibrations,
    }


def _study(
    title: str, trials: Sequence[Stored], beside: Beside, store: Store | None
) -> dict[str, Any]:
    rows = [each.row for each in trials]
    cells = _cells(rows, beside)
    run = trials[-1].run if trials else {}
    words = verdicts.of_ablation(rows) if any(not row.is_dense for row in rows) else []
    text = trials[0].identity["text"] if trials else ""
    kls = {} if store is None else store.passages(text)
    order = sorted(trials, key=lambda each: -each.row.kl)
    passage = [each for each in order if each.key in kls]
    return {
        "title": title,
        "words": words,
        "model": run.get("model_name") or "",
        "roles": in_model_order(sorted(role for role, _ in cells)),
        "cells": list(cells.values()),
        "settings": _settings(rows, beside.sensitivity, cells),
        "trials": [_trial(each.row) for each in order],
        "tokens": None if store is None else store.tokens(text),
        "passages": {
            order.index(each): base64.b64encode(kls[each.key]).decode() for each in passage
        },
        "outliers": _outliers(beside.outliers, list(cells)),
        "receipts": _receipts(trials),
    }


def _cells(rows: Iterable[Row], beside: Beside) -> dict[Cell, dict[str, Any]]:
    """Return every role in every block with its size, in the model's order."""
    found: dict[Cell, dict[str, Any]] = {}
    for score in beside.sensitivity:
        role, block = score["role"], score["block"]
        if block is not None:
            new = {"role": role, "block": block, "parameters": 0, "dense": None, "paths": []}
            known = found.setdefault((role, block), new)
            if score["path"] not in known["paths"]:
                known["paths"].append(score["path"])
                known["parameters"] += score["parameters"]
    for each in rows:
        if (cell := cell_of(each.selector)) and each.direction == "only":
            new = {"role": cell[0], "block": cell[1], "paths": []}
            found.setdefault(cell, new).update(parameters=each.parameters, dense=each.bytes_dense)
    roles = in_model_order(role for role, _ in found)
    width = next((c["dense"] / c["parameters"] for c in found.values() if c["dense"]), 2)
    for known in found.values():
        known["dense"] = known["dense"] or int(width * known["parameters"])
    return dict(sorted(found.items(), key=lambda item: (item[0][1], roles.index(item[0][0]))))


def _settings(
    rows: Iterable[Row], scores: Rows, cells: Mapping[Cell, dict[str, Any]]
) -> list[dict[str, Any]]:
    measured: dict[Setting, dict[Cell, Row]] = {}
    for row in rows:
        if (cell := cell_of(row.selector)) and row.direction == "only" and row.format:
            setting = row.format, row.activations, row.quantizer
            measured.setdefault(setting, {})[cell] = row
    estimated: dict[Setting, dict[Cell, list[tuple[float, float]]]] = {}
    for each in scores:
        if each["block"] is not None:
            setting = each["format"], each["activations"], each["quantizer"]
            own = estimated.setdefault(setting, {})
            own.setdefault((each["role"], each["block"]), []).append(
                (each["kl"], each.get("kl_se", 0.0))
            )
    return [
        _setting(setting, measured.get(setting, {}), estimated.get(setting, {}), cells)
        for setting in dict.fromkeys((*measured, *estimated))
    ]


def _setting(
    setting: Setting,
    measured: Mapping[Cell, Row],
    estimated: Mapping[Cell, Sequence[tuple[float, float]]],
    cells: Mapping[Cell, dict[str, Any]],
) -> dict[str, Any]:
    format, activations, quantizer = setting
    block_format = get_format(format)
    sums = {
        cell: (fsum(kl for kl, _ in each), hypot(*(se for _, se in each)))
        for cell, each in estimated.items()
    }
    factor = to_scale(
        {cell: kl for cell, (kl, _) in sums.items()},
        {cell: row.kl for cell, row in measured.items()},
    )
    size = block_format.bits + (8 / block_format.block_size if block_format.block_size else 0)
    found: dict[str, list[Any]] = {"kl": [], "se": [], "bytes": [], "measured": []}
    for cell, known in cells.items():
        row, score = measured.get(cell), sums.get(cell)
        kl, se = (row.kl, row.kl_se or 0.0) if row else score or (None, None)
        scale = 1.0 if row or factor is None else factor
        found["kl"].append(_short(kl, scale))
        found["se"].append(_short(se, scale))
        found["bytes"].append(row.bytes_packed if row else int(known["parameters"] * size / 8))
        found["measured"].append(int(row is not None))
    mode = mode_of(format, activations)
    how = "" if quantizer == "rtn" else f" {quantizer}"
    return {
        "name": f"{format} {mode}{how}",
        "format": format,
        "activations": activations,
        "quantizer": quantizer,
        "needs_data": Quantizer.parse(quantizer, block_format).needs_data,
        **found,
    }


def _trial(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "selector": row.selector,
        "format": row.format or "dense",
        "mode": row.activation_mode if row.format else "",
        "activations": row.activations,
        "quantizer": row.quantizer if row.format else "",
        "direction": row.direction,
        "linears": row.linears,
        "saved": max(row.bytes_dense - row.bytes_packed, 0),
        "kl": _short(row.kl),
        "kl_se": _short(row.kl_se),
        "dnll": _short(row.dnll),
        "dnll_se": _short(row.dnll_se),
        "kl_p99": _short(row.kl_p99),
        "top1": _short(row.top1),
        "ppl": _short(row.ppl),
    }


def _outliers(rows: Rows, cells: Sequence[Cell]) -> dict[int, Any]:
    found = {}
    for row in rows:
        if (cell := (row["role"], row["block"])) in cells:
            found[cells.index(cell)] = {
                side: [_short(row[side][key]) for key in ("ratio", "kurtosis", "outlier_channels")]
                for side in ("input", "weight")
            }
    return found


def _receipts(trials: Sequence[Stored]) -> list[dict[str, Any]]:
    """Return what runs measured the trials, each once."""
    found: dict[str, dict[str, Any]] = {}
    for each in trials:
        facts = {key: each.run.get(key, each.identity.get(key)) for key in _RECEIPT}
        command = facts["command"]
        facts["command"] = " ".join(command) if isinstance(command, list) else command
        facts |= {"model": each.identity["model"], "text": each.identity["text"]}
        facts["corpus"] = each.run.get("corpus")
        known = found.setdefault(repr(facts), {**facts, "trials": 0})
        known["trials"] += 1
    return list(found.values())


def _short(value: float | None, factor: float = 1.0) -> float | None:
    if value is None or not isfinite(value):
        return None
    return float(f"{value * factor:.4g}")
