"""Tasks of lm-evaluation-harness, with data of our own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from fp4graph import OptionError, StudyError
from fp4graph.cli import main
from fp4graph.models import LoadedModel, load
from fp4graph.study.harness import evaluate_tasks
from fp4graph.study.trial import Trial, trials

if TYPE_CHECKING:
    from pathlib import Path

TASK = """\
task: numbers
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [
        {"context": f"number {i}:", "choices": [" a", " q", " z", " 5"], "answer": i % 4}
        for i in range(24)
    ]
    data = tmp_path / "numbers.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in questions), encoding="utf-8")
    (tmp_path / "numbers.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_answers_are_compared_question_by_question(tiny_folder: Path, tasks: Path) -> None:
    loaded = load(str(tiny_folder))
    plan = trials(["all", "v"], ["mxfp4"], ["none", "same"], ["only", "except"])
    rows = list(evaluate_tasks(loaded, plan, ["numbers"], include=tasks))
    assert {row.task for row in rows} == {"numbers"}
    accuracies = {
        (row.selector, row.direction, row.activations): row for row in rows if row.metric == "acc"
    }
    assert len(accuracies) == len(plan)
    dense = accuracies["none", "only", "none"]
    assert (dense.difference, dense.questions) == (0, 24)
    for row in accuracies.values():
        assert row.value == pytest.approx(dense.value + row.difference)
    assert any(row.difference_se for row in accuracies.values()), "FP4 does something"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command(tiny_folder: Path, tasks: Path) -> None:
    arguments = ["tasks", str(tiny_folder), "--task", "numbers", "--include", str(tasks)]
    arguments += ["--select", "mlp", "--limit", "3"]
    result = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {(row["selector"], row["questions"]) for row in rows} == {("none", 3), ("mlp", 3)}
    assert "above dense" in CliRunner().invoke(main, arguments).output


@pytest.mark.slow  # the harness looks through its thousands of tasks
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_run(tiny_folder: Path) -> None:
    loaded = load(str(tiny_folder))
    with pytest.raises(OptionError, match="knows no task 'no_such_task'"):
        next(evaluate_tasks(loaded, [Trial("all", "nvfp4")], ["no_such_task"]))
    random = LoadedModel("tiny", loaded.model, None)
    with pytest.raises(StudyError, match="random weights"):
        next(evaluate_tasks(random, [], ["numbers"]))
