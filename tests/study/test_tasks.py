"""Tasks of lm-evaluation-harness of every kind, with data of our own."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.trials import plan as plan_of

import fp4graph
from fp4graph import OptionError, StudyError
from fp4graph.cli import main
from fp4graph.models import LoadedModel, load
from fp4graph.study.compiled import compiled, forward_replaced
from fp4graph.study.tasks import evaluate_tasks
from fp4graph.study.trial import Trial

if TYPE_CHECKING:
    from pathlib import Path

    from fp4graph.study.tasks import TaskRow

QUESTIONS = 12
HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
target_delimiter: ""
doc_to_text: "{{{{context}}}}"
"""
CHOICE = (
    HEAD
    + """\
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: mcc}}]
"""
)
LIKELIHOOD = (
    HEAD
    + """\
output_type: loglikelihood
doc_to_target: " door"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""
)
ROLLING = (
    HEAD
    + """\
output_type: loglikelihood_rolling
doc_to_target: "{{{{context}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
)
# the first filter finds no answer in any text, the second always the same one
GENERATE = (
    HEAD
    + """\
output_type: generate_until
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["@@@@"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - name: as-said
    filter: [{{function: take_first}}]
  - name: never
    filter:
      - {{function: regex, regex_pattern: "zq(zq)zq", fallback: "?"}}
      - {{function: take_first}}
"""
)
# leaves every third question out, one metric is a text, and one hangs on the answer
OWN = (
    HEAD
    + """\
output_type: generate_until
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["@@@@"], max_gen_toks: 6, do_sample: false}}
process_results: !function own.process
metric_list:
  - {{metric: length, aggregation: mean}}
  - {{metric: word, aggregation: !function own.words}}
  - {{metric: kept, aggregation: mean}}
"""
)
OWN_CODE = """\
def process(doc, results):
    length = {"length": float(len(results[0]))} if doc["answer"] else {}
    kept = {"kept": 1.0} if results[0].strip() == doc["said"].strip() else {}
    return {"word": results[0]} | length | kept

def words(items):
    return "many"
"""
GROUP = """\
group: both
task: [choice, likelihood]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LoadedModel:
    return load(str(tiny_folder))


def said(model: Any, tokenizer: Any, context: str) -> str:
    ids = tokenizer(context, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: LoadedModel) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {"context": f"number {i}:", "choices": [" a", " q", " z", " 5"], "answer": i % 3}
        for i in range(QUESTIONS)
    ]
    for question in questions:
        question["said"] = said(model.model, model.tokenizer, str(question["context"]))
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in questions), encoding="utf-8")
    kinds = {
        "choice": CHOICE, "likelihood": LIKELIHOOD, "rolling": ROLLING, "generate": GENERATE,
        "own": OWN,
    }  # fmt: skip
    for name, text in kinds.items():
        (folder / f"{name}.yaml").write_text(text.format(name=name, data=data), encoding="utf-8")
    (folder / "both.yaml").write_text(GROUP, encoding="utf-8")
    (folder / "own.py").write_text(OWN_CODE, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def twin(model: Any) -> Any:
    """Copy a model with all block linears rounded to MXFP4 by hand."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.weight.data = fp4graph.quantize(module.weight, "mxfp4").dequantize()
    return model


def likelihood(model: Any, tokenizer: Any, context: str, answer: str) -> float:
    before, ids = tokenizer(context)["input_ids"], tokenizer(context + answer)["input_ids"]
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logp[i - 1, ids[i]]) for i in range(len(before), len(ids)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_every_kind_of_task_is_scored_by_the_harness_s_own_rule(
    model: LoadedModel, folder: Path
) -> None:
    plan = [Trial.of("all", "mxfp4")]
    names = ["both", "rolling", "generate", "own"]
    rows: dict[tuple[str, ...], TaskRow] = {
        (row.selector, row.task, row.metric, row.filter): row
        for row in evaluate_tasks(model, plan, names, include=folder)
    }
    rounded = twin(model.model)
    contexts = [f"number {i}:" for i in range(QUESTIONS)]

    answers = [said(model.model, model.tokenizer, each) for each in contexts]
    others = [said(rounded, model.tokenizer, each) for each in contexts]
    kept = [one == other for one, other in zip(answers, others, strict=True)]
    assert rows["none", "generate", "exact_match", "as-said"].value == 1
    generated = rows["all", "generate", "exact_match", "as-said"]
    assert generated.value == pytest.approx(np.mean(kept)), "generate ran what was rewritten"
    assert generated.value < 1
    assert rows["all", "generate", "exact_match", "never"].value == 0

    for selector, each in (("none", model.model), ("all", rounded)):
        found = [likelihood(each, model.tokenizer, context, " door") for context in contexts]
        row = rows[selector, "likelihood", "perplexity", "none"]
        assert row.value == pytest.approx(math.exp(-np.mean(found)), rel=1e-3)
    error = rows["all", "likelihood", "perplexity", "none"].difference_se
    assert error is not None
    assert error > 0

    rolling = rows["all", "rolling", "byte_perplexity", "none"]
    assert rolling.difference_se
    assert rolling.value == pytest.approx(
        rows["none", "rolling", "byte_perplexity", "none"].value + rolling.difference
    )

    group, parts = rows["all", "both", "acc", "none"], ("choice", "likelihood")
    of_parts = [rows["all", part, "acc", "none"] for part in parts]
    assert group.value == pytest.approx(np.mean([each.value for each in of_parts]))
    assert group.difference == pytest.approx(np.mean([each.difference for each in of_parts]))
    assert group.questions == 2 * QUESTIONS
    assert rows["all", "choice", "mcc", "none"].value is not None, "of all questions together"

    length, word = rows["all", "own", "length", "none"], rows["all", "own", "word", "none"]
    assert (length.questions, length.note) == (8, "4 of 12 questions have no value")
    assert (word.value, word.difference, word.note) == (None, None, "word gives no number")
    dense, kept_ = (rows[each, "own", "kept", "none"] for each in ("none", "all"))
    assert (dense.value, dense.questions) == (1, QUESTIONS)
    assert (kept_.questions, kept_.difference) == (sum(kept), 0 if sum(kept) else None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trials_are_compared_question_by_question(model: LoadedModel, folder: Path) -> None:
    plan = plan_of("all", "v", formats=["mxfp4"], directions=["only", "except"])
    plan.append(Trial.of("v", "mxfp4", "same", "except"))
    rows = list(evaluate_tasks(model, plan, ["choice"], include=folder))
    accuracies = {
        (row.selector, row.direction, row.activations): row for row in rows if row.metric == "acc"
    }
    assert len(accuracies) == len(plan)
    dense = accuracies["none", "only", "none"]
    assert (dense.difference, dense.questions) == (0, QUESTIONS)
    for row in accuracies.values():
        assert row.value == pytest.approx(dense.value + row.difference)
    assert any(row.difference_se for row in accuracies.values()), "FP4 does something"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_converted_model_answers_as_the_compiled_one(model: LoadedModel, folder: Path) -> None:
    own = copy.deepcopy(model.model)
    fp4graph.convert(own, "all", format="mxfp4")
    plan = [Trial.of("all", "mxfp4"), Trial.of_packed(replace(model, name="own", model=own))]
    rows = list(evaluate_tasks(model, plan, ["choice", "generate"], include=folder))
    _, compiled_, converted = (
        [row for row in rows if (row.selector, row.name) == each]
        for each in (("none", ""), ("all", ""), ("all", "own"))
    )
    assert [row.value for row in converted] == [row.value for row in compiled_]
    assert any(row.difference for row in converted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command(tiny_folder: Path, folder: Path) -> None:
    arguments = ["tasks", str(tiny_folder), "--task", "choice", "--include", str(folder)]
    arguments += ["--select", "mlp", "--limit", "3"]
    result = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {(row["selector"], row["questions"]) for row in rows} == {("none", 3), ("mlp", 3)}
    assert "above dense" in CliRunner().invoke(main, arguments).output


@pytest.mark.slow  # the harness looks through its thousands of tasks
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_run(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="knows no task 'no_such_task'"):
        next(evaluate_tasks(model, [Trial.of("all", "nvfp4")], ["no_such_task"]))
    random = LoadedModel("tiny", model.model, None, is_random=True)
    with pytest.raises(StudyError, match="random weights"):
        next(evaluate_tasks(random, [], ["numbers"]))
    text = CHOICE.format(name="gone", data=tmp_path / "no.jsonl")
    (tmp_path / "gone.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(StudyError, match=r"gone.*FileNotFoundError"):
        next(evaluate_tasks(model, [], ["gone"], include=tmp_path))


def test_a_forward_that_runs_no_graph_is_an_error(model: LoadedModel) -> None:
    ids = torch.arange(8)[None]
    backend = fp4graph.backend("all", inner="eager", model=model.model)
    forward = compiled(model.model, backend)
    with forward_replaced(model.model, forward), torch.no_grad():
        changed, before = model.model(ids).logits, backend.runs.count
        model.model.generate(ids, max_new_tokens=2, pad_token_id=0)
        assert backend.runs.count == before + 2
        plain = torch.compiler.set_stance("force_eager")
        with plain, pytest.raises(StudyError, match="dense"):
            model.model(ids)
    assert "forward" not in model.model.__dict__
    with torch.no_grad():
        assert not torch.equal(model.model(ids).logits, changed)
    emptied = fp4graph.backend("v", inner="eager")
    forward = compiled(model.model, emptied)
    with torch.no_grad():
        forward(ids)
        emptied.report.rows_by_path.clear()
        with pytest.raises(StudyError, match="did not run as selected"):
            forward(ids)
