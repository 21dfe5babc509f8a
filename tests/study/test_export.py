"""Results for other programs."""

from __future__ import annotations

import csv
import json
import sys
from typing import TYPE_CHECKING

import pytest

from fp4graph import OptionError, StudyError
from fp4graph.study import export as export_module
from fp4graph.study.export import export

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [
    {"selector": "q", "dnll": 0.5, "dnll_se": None},
    {"selector": "v", "dnll": -0.1, "dnll_se": 1.5},
]


def test_json_lines(tmp_path: Path) -> None:
    export(ROWS, tmp_path / "a.jsonl")
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == ROWS


def test_csv(tmp_path: Path) -> None:
    export(ROWS, tmp_path / "new" / "a.csv")
    with (tmp_path / "new" / "a.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"selector": "q", "dnll": "0.5", "dnll_se": ""},
            {"selector": "v", "dnll": "-0.1", "dnll_se": "1.5"},
        ]


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    export(ROWS, tmp_path / "a.parquet")
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() == ROWS
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OptionError, match=r"pip install 'fp4graph\[parquet\]'"):
        export(ROWS, tmp_path / "b.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet"]


def test_bad_names_and_places(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="expected a name that ends with"):
        export(ROWS, tmp_path / "a.xlsx")
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot write"):
        export(ROWS, tmp_path / "file" / "a.csv")


def test_two_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    write = export_module._json_lines

    def meanwhile(rows: object, path: Path) -> None:
        monkeypatch.setattr(export_module, "_json_lines", write)
        write(ROWS, path)
        monkeypatch.setattr("fp4graph.files.os.getpid", lambda: 1)
        export(ROWS[:1], file)  # as another process would, from beginning to end

    monkeypatch.setattr(export_module, "_json_lines", meanwhile)
    export(ROWS, file)
    assert len(file.read_text().splitlines()) == len(ROWS), "the last one to end"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
