"""A folder of results: what its store holds, as rows for other programs and as tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from fp4graph import SelectorError, StudyError
from fp4graph.files import write_text
from fp4graph.study import verdicts, views
from fp4graph.study.ablate import PROTOCOL
from fp4graph.study.export import export
from fp4graph.study.given import short
from fp4graph.study.plan import DIRECTIONS
from fp4graph.study.plot import draw
from fp4graph.study.selections import kind_of
from fp4graph.study.store import Store
from fp4graph.study.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from fp4graph.study.store import Stored
    from fp4graph.study.trial import Row

STORE = "trials.sqlite"
_OF_A_RUN = (
    *("model_name", "corpus", "windows", "seq_len", "scored_tokens", "date", "machine", "threads"),
    *("python", "command"),
)
_OF_A_TRIAL = {"calibration", "arithmetic", "selector", "format", "activations", "quantizer"}
_OF_A_TRIAL |= {"direction", "kernels"}


def open_results(path: Path) -> Store:
    """Open a results folder, or its trials.sqlite.

    Raises:
        StudyError: there is none.
    """
    file = path / STORE if path.is_dir() else path
    if not file.is_file():
        raise StudyError(f"there are no results in {path}")
    return Store(file)


def records(stored: Iterable[Stored]) -> list[dict[str, Any]]:
    """Return trials as rows for other programs, all with the same keys.

    A row has the result, the names of model and corpus, date and machine of the run that measured
    it, and all that the result depends on.
    """
    found = []
    for each in stored:
        run = {key: each.run.get(key) for key in _OF_A_RUN}
        run["command"] = None if run["command"] is None else " ".join(run["command"])
        found.append({"name": each.name, **each.result, **run, **each.identity})
    keys = dict.fromkeys(key for row in found for key in row)
    return [{key: row.get(key) for key in keys} for row in found]


def write(store: Store, folder: Path) -> None:
    """Write what a store holds beside it: `ablation.jsonl`, `runs.jsonl` and `ablation.png`.

    The picture is of the study whose trial ended last.

    Raises:
        StudyError: a file cannot be written.
    """
    stored = store.all()
    export(records(stored), folder / "ablation.jsonl")
    lines = "".join(json.dumps(run) + "\n" for run in store.runs())
    write_text(folder / "runs.jsonl", lines)
    found = studies(stored)
    if found:
        title, last = list(found.values())[-1]
        rows = [each.row for each in last]
        if any(not row.is_dense for row in rows):
            draw(rows, title, folder / "ablation.png")


@dataclass(frozen=True)
class Wanted:
    """Which trials of a store to show; what is empty leaves all.

    Attributes:
        select: selectors or names, or patterns for them (`fnmatch`).
        by: trials of each `role`, of each `block`, or of each role in each block alone.
        format: formats.
        activations: modes.
        quantizer: how codes were found.
        direction: `only` or `except`.
        model: names or hashes of models, or patterns.
        corpus: names or hashes of texts, or patterns.
        dtype: of what stays dense: `float32`.
    """

    select: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    format: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    quantizer: tuple[str, ...] = ()
    direction: str = "both"
    model: tuple[str, ...] = ()
    corpus: tuple[str, ...] = ()
    dtype: tuple[str, ...] = ()

    def has(self, stored: Stored) -> bool:
        """Whether a trial is wanted; the dense model's is with every other."""
        row, identity, run = stored.row, stored.identity, stored.run
        if not _matches(self.model, identity["model"], run.get("model_name")):
            return False
        if not _matches(self.corpus, identity["text"], run.get("corpus")):
            return False
        if not _matches(self.dtype, str(identity["dtype"]).removeprefix("torch.")):
            return False
        return row.is_dense or (
            _matches(self.select, row.selector, row.name)
            and _matches(self.by, kind_of(row.selector))
            and _matches(self.format, row.format)
            and _matches(self.activations, row.activations)
            and _matches(self.quantizer, row.quantizer)
            and row.direction in DIRECTIONS[self.direction]
        )


def _matches(patterns: Sequence[str], *values: str | None) -> bool:
    if not patterns:
        return True
    known = [value for value in values if value]
    return any(value == each or fnmatchcase(value, each) for each in patterns for value in known)


def show(store: Store, wanted: Wanted = Wanted()) -> list[Table]:
    """Return a table for each model and text of a store, of the trials that are wanted.

    Raises:
        SelectorError: there is none.
    """
    stored = [each for each in store.all() if each.identity.get("protocol") == PROTOCOL]
    found = studies([each for each in stored if wanted.has(each)])
    tables = [
        table_of([each.row for each in trials], title)
        for title, trials in found.values()
        if any(not each.row.is_dense for each in trials)
    ]
    if not tables:
        known = ", ".join(dict.fromkeys(each.name or each.result["selector"] for each in stored))
        text = ",".join(wanted.select) or "none"
        raise SelectorError(text, f"no trial is like that; there are {known[:500] or 'none'}")
    return tables


def table_of(rows: Sequence[Row], title: str, left: int = 0) -> Table:
    """Return trials of one model and text as a table.

    Args:
        rows: the trials.
        title: of the table and of its picture.
        left: how many trials were not run for lack of time.
    """
    words = verdicts.of_ablation(rows, left)
    return Table(
        rows, views.of_ablation(rows, title), words, draw=lambda path: draw(rows, title, path)
    )


def studies(stored: Iterable[Stored]) -> dict[str, tuple[str, list[Stored]]]:
    """Return the trials of each model and text, with a title; last whose trial ended last."""
    found: dict[str, tuple[str, list[Stored]]] = {}
    for each in stored:
        if each.identity.get("protocol") != PROTOCOL:
            continue
        common = {key: each.identity[key] for key in each.identity.keys() - _OF_A_TRIAL}
        key = json.dumps(common, sort_keys=True)
        title, trials = found.pop(key, (title_of(each.run, each.identity), []))
        trials.append(each)
        found[key] = title, trials
    return found


def title_of(run: dict[str, Any], identity: dict[str, Any]) -> str:
    """Return what a study is called: model, text, tokens, dtype."""
    model = run.get("model_name") or f"model {identity['model']}"
    corpus = short(run.get("corpus") or "") or f"text {identity['text']}"
    tokens = f", {run['scored_tokens']} tokens" if "scored_tokens" in run else ""
    return f"{model}, {corpus}{tokens}, {str(identity['dtype']).removeprefix('torch.')}"
