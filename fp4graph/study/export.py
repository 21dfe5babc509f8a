"""Results as tables for other programs: JSON lines, CSV, Parquet."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

from fp4graph import OptionError, StudyError
from fp4graph.files import written_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FORMATS = (".jsonl", ".csv", ".parquet")


def export(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows, all with the same keys, in the format that the file's name asks for.

    The file is written whole or not at all.

    Raises:
        OptionError: a name that ends otherwise, or Parquet without pyarrow.
        StudyError: the file cannot be written.
    """
    if path.suffix not in FORMATS:
        raise OptionError(f"{path}: expected a name that ends with {', '.join(FORMATS)}")
    write = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}[path.suffix]
    try:
        with written_whole(path) as draft:
            write(rows, draft)
    except OSError as error:
        raise StudyError(f"cannot write {path}: {error.strerror}") from None


def _json_lines(rows: Sequence[dict[str, Any]], path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


def _csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    try:
        from pyarrow import Table, parquet
    except ImportError:
        raise OptionError("Parquet needs a package: pip install 'fp4graph[parquet]'") from None
    parquet.write_table(Table.from_pylist(list(rows)), path)
