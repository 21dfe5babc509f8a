"""Tables at every width: numbers whole or left out, long texts cut or in a legend."""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from io import StringIO
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from rich.console import Console

import fp4graph
from fp4graph.tables import Column, TextTable, cut_middle, digits_for, nats, to_columns, to_pandas

MIX = "all," + ",".join(f"!(gate,blocks={block})" for block in range(40))


def at(table: TextTable, width: int) -> list[str]:
    out = StringIO()
    Console(file=out, width=width, highlight=False).print(table)
    return out.getvalue().splitlines()


def table(*labels: str, numbers: int = 8) -> TextTable:
    return TextTable(
        "a title",
        [
            Column("FP4 in", labels, "label"),
            Column("format", ["nvfp4"] * len(labels), "text"),
            *(
                Column(f"n{n}", [f"{n}.{m:04}" for m in range(len(labels))], rank=n)
                for n in range(numbers)
            ),
        ],
    )


def test_a_selector_of_any_length_leaves_every_number() -> None:
    lines = at(table("q", MIX, "v"), 120)
    assert all(len(line) <= 120 for line in lines)
    head = next(number for number, line in enumerate(lines) if line.startswith("FP4 in"))
    first, second, third = (line.split() for line in lines[head + 1 : head + 4])
    assert first[0] == "q"
    assert second[0] == "#1"
    assert second[-8:] == [f"{n}.0001" for n in range(8)]
    assert third[0] == "v"
    legend = " ".join(" ".join(lines[head + 4 :]).split()).replace(" ", "")
    assert legend.startswith(f"#1{MIX}")


@given(
    width=st.integers(30, 250),
    labels=st.lists(st.text("abcdef,!()", min_size=1, max_size=200), min_size=1, max_size=6),
    numbers=st.integers(1, 12),
)
def test_numbers_are_whole_at_every_width(width: int, labels: list[str], numbers: int) -> None:
    shown = table(*labels, numbers=numbers)
    lines = at(shown, width)
    head = next(number for number, line in enumerate(lines) if line.startswith("FP4 in"))
    names = [name for name in lines[head].split() if name[0] == "n"]
    assert names, "what has rank 0 always stays"
    assert names == [f"n{n}" for n in range(len(names))], "the least important go first"
    for row in range(len(labels)):
        cells = lines[head + 1 + row].split()[-len(names) :]
        assert cells == [f"{n}.{row:04}" for n in range(len(names))]
    said = "".join(lines)
    assert ("no room at" in said) == (len(names) < numbers)


def test_what_is_the_same_in_all_rows_is_said_once() -> None:
    lines = at(table("q", "v"), 120)
    assert lines[:2] == ["a title", "in all rows: format nvfp4"]
    assert "nvfp4" not in "".join(lines[2:])
    assert "format" in at(table("q"), 120)[1], "of a single row nothing is the same"


def test_what_was_left_out_is_said() -> None:
    lines = at(table("q", "v", numbers=12), 60)
    said = " ".join(" ".join(lines[-2:]).split())
    assert "no room at 60 columns for: n" in said
    assert said.endswith("--json has all")


def test_texts_are_cut_in_their_middle() -> None:
    assert cut_middle("model.layers.29.self_attn.k_proj", 20) == "model.laye…tn.k_proj"
    assert cut_middle("short", 20) == "short"
    paths = [f"model.layers.{n}.self_attn.k_proj" for n in range(3)]
    shown = TextTable("", [Column("path", paths, "text"), Column("n", ["1.25", "2.5", "3"])])
    lines = at(shown, 26)
    assert [line.split()[-1] for line in lines[1:]] == ["1.25", "2.5", "3"]
    assert all("…" in line and len(line) <= 26 for line in lines[1:])


def test_digits_follow_the_smallest_number() -> None:
    assert nats([0.25, None, 0.0041], digits_for([0.25, 0.0041])) == ["0.2500", "", "0.0041"]
    assert nats([0.0000412], digits_for([0.0000412]), signed=True) == ["+0.000041"]
    assert digits_for([0.0, None]) == 4


def test_html_escapes_and_keeps_all() -> None:
    html = table("blocks<3", MIX).html()
    assert "blocks&lt;3" in html
    assert MIX in html
    assert html.count("<tr>") == 3


@dataclass(frozen=True)
class Inner:
    ratio: float


@dataclass(frozen=True)
class Outer:
    path: str
    input: Inner


def test_rows_by_column() -> None:
    rows = [Outer("a", Inner(1.0)), Outer("b", Inner(2.0))]
    assert to_columns(rows) == {"path": ["a", "b"], "input.ratio": [1.0, 2.0]}
    assert to_pandas(rows)["input.ratio"].sum() == 3.0
    assert to_columns([]) == {}


def test_pandas_is_asked_for_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(fp4graph.OptionError, match=r"pip install 'fp4graph\[pandas\]'"):
        to_pandas([])
