"""The project's own questions: what is in them, and that the harness asks them."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp4graph.models import load
from fp4graph.study.tasks import QUESTIONS, evaluate_tasks

if TYPE_CHECKING:
    from types import ModuleType

BENCH = Path(__file__).parents[2] / "bench/questions.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("questions", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[dict[str, Any]]:
    lines = (QUESTIONS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["choice", "answers"])
def test_the_files_are_what_the_script_writes(name: str, script: ModuleType) -> None:
    made = getattr(script, name)()
    assert read(name) == [{k: v for k, v in each.items() if v != []} for each in made]


def test_every_choice_has_one_right_answer_at_no_place_of_its_own() -> None:
    found = read("choice")
    assert len(found) >= 300
    places = Counter(each["answer"] for each in found)
    assert all(80 <= places[place] <= 120 for place in range(4))
    for each in found:
        assert len(set(each["choices"])) == 4
        if each["kind"] == "python":
            text = each["question"].removeprefix("In Python, what is the value of ")[:-1]
            assert repr(eval(text)) == each["choices"][each["answer"]]
        if each["kind"] == "arithmetic":
            text = each["question"].removeprefix("What is ")[:-1]
            assert str(eval(text)) == each["choices"][each["answer"]]


def test_short_answers_are_short_and_asked_once() -> None:
    found = read("answers")
    assert len(found) >= 150
    assert len({each["question"] for each in found}) == len(found)
    assert all(0 < len(each["answer"]) < 20 for each in found)


@pytest.mark.parametrize("name", ["choice", "answers"])
def test_the_first_hundred_are_of_all_kinds(name: str) -> None:
    found = read(name)
    assert {each["kind"] for each in found[:100]} == {each["kind"] for each in found}


def test_the_harness_asks_them(tiny_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = list(evaluate_tasks(load(str(tiny_folder)), [], ["fp4graph"], limit=3))
    assert {(row.task, row.metric, row.questions) for row in rows} == {
        ("fp4graph_choice", "acc", 3),
        ("fp4graph_answers", "exact_match", 3),
    }
    assert all(row.value is not None for row in rows)
