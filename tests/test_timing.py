"""Calls that alternate, and files that keep what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp4graph.timing import alternated, is_quiet, keep, kept, kept_file

if TYPE_CHECKING:
    import pytest


def test_calls_alternate_in_an_order_that_rotates() -> None:
    order: list[str] = []
    calls = [lambda name=name: order.append(name) for name in "abc"]
    times = alternated(calls, 2, lambda: order.append("."))
    assert "".join(order).replace(".", "") == "abcbcacab"
    assert order.count(".") == 2 * 9
    assert [len(each) for each in times] == [2, 2, 2]


def test_a_slow_median_is_a_busy_machine() -> None:
    assert is_quiet([[1.0, 1.1, 1.2], [5.0, 5.0]])
    assert not is_quiet([[1.0, 1.1, 1.2], [1.0, 2.0, 2.0]])


def test_files_keep_what_was_there(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP4GRAPH_CACHE", str(tmp_path))
    file = kept_file("things", "A CPU @ 2 GHz", 2)
    assert file != kept_file("things", "A CPU @ 2 GHz", 4)
    assert kept(file) == {}
    keep(file, {"a": 1, "b": [2]})
    keep(file, {"a": 3})
    assert kept(file) == {"a": 3, "b": [2]}
