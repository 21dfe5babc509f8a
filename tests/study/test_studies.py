"""The studies from Python: a model in memory, tokens as tensors, tables as data."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.models import tiny, tokens

import fp4graph
from fp4graph import CorpusError, ModelError, OptionError, StudyError, study
from fp4graph.models import LoadedModel
from fp4graph.study.progress import SILENT

if TYPE_CHECKING:
    from pathlib import Path

IDS = tokens(16, batch=4)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")  # whose parameters ask for gradients, as those of any model in memory


def test_without_a_selection_every_role_is_tried(model: Any) -> None:
    table = study.ablate(model, IDS)
    assert [row.selector for row in table] == ["none", "q", "k", "v", "o", "gate", "up", "down"]
    assert isinstance(table, study.Table)


def test_as_the_issue_calls_it(model: Any) -> None:
    table = study.ablate(
        model, IDS, select=["attn", "all"], format=["nvfp4"], activations=["none"],
        quantizer=["rtn"], out=None,
    )  # fmt: skip
    assert len(table) == 3
    frame = table.to_pandas()
    assert list(frame["selector"]) == ["none", "attn", "all"]
    assert frame["kl"].max() == max(row.kl for row in table)
    assert table.to_dict()["kl"] == [row.kl for row in table]
    assert [json.loads(line)["kl"] for line in table.json_lines().splitlines()] == list(frame["kl"])
    html = table._repr_html_()
    assert "<table>" in html
    assert "nats KL a token" in html
    assert "attn" in repr(table)
    assert table[-1] is table.rows[-1]
    assert table[1:] == table.rows[1:]


def test_a_model_in_training_is_measured_in_evaluation_and_left_in_training() -> None:
    gpt2 = tiny("gpt2")
    gpt2.config.resid_pdrop = 0.5
    for module in gpt2.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    gpt2.train()
    gpt2.transformer.h[0].eval()
    before = [module.training for module in gpt2.modules()]
    one, other = (study.ablate(gpt2, IDS, "all") for _ in range(2))
    assert one.rows == other.rows
    assert [module.training for module in gpt2.modules()] == before


def test_sensitivity_outliers_and_additivity(model: Any, tmp_path: Path) -> None:
    study.ablate(model, IDS, by="role,block", out=tmp_path)
    study.ablate(model, IDS, ["q", "all"], out=tmp_path)
    scores = study.sensitivity(model, IDS, against=tmp_path)
    assert len(scores) == 14
    assert len(scores.more[0]) > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    reach = study.outliers(model, IDS, against=tmp_path)
    assert len(reach) == 15
    assert reach.to_dict()["input.ratio"][0] > 1
    sums = study.additivity(model, tmp_path)
    assert {row.name for row in sums} == {"q", "all"}
    for number, table in enumerate((scores, reach, sums)):
        table.draw(tmp_path / f"{number}.png")
        table.save(tmp_path / f"{number}.jsonl")
        assert len((tmp_path / f"{number}.jsonl").read_text().splitlines()) == len(table)


def test_additivity_says_what_is_lacking(model: Any, tmp_path: Path) -> None:
    study.ablate(model, IDS, by="role,block", out=tmp_path)
    with pytest.raises(StudyError, match=r"no trial of several linears.*--select attn"):
        study.additivity(model, tmp_path)


@pytest.mark.slow
def test_latency(model: Any) -> None:
    mix = {"all": "nvfp4", "v": None}
    table = study.latency(
        model.requires_grad_(False), ["q", mix], inner="eager", name=["", "mix"], prompt_tokens=4,
        new_tokens=3, rounds=2,
    )  # fmt: skip
    assert [row.label for row in table] == ["dense", "q", "mix"]
    assert [row.rounds for row in table] == [2, 2, 2]
    with pytest.raises(OptionError, match="is for inner='inductor'"):
        study.latency(model, inner="eager", mode="max-autotune")


@pytest.mark.parametrize(
    "ids, words",
    [
        (torch.zeros(8, dtype=torch.int64), r"int64 \[windows, length\], got torch.int64 \[8\]"),
        (torch.zeros(2, 8), "got torch.float32"),
        ([[1, 2]], "got list"),
        (torch.zeros(2, 1, dtype=torch.int64), "a window needs 2 tokens"),
        (torch.full((2, 8), 10_000), "and the model knows 0 to"),
    ],
)  # fmt: skip
def test_tokens_that_a_model_cannot_take(model: Any, ids: Any, words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        study.ablate(model, ids)


def test_what_is_no_model() -> None:
    with pytest.raises(ModelError, match=r"models\.load\(name\) loads one"):
        study.ablate("smollm2-135m", IDS)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"fp4graph\.models\.load"):
        fp4graph.explain("smollm2-135m", IDS)  # type: ignore[arg-type]
    random = LoadedModel("tiny", tiny("llama"), None, is_random=True)
    with pytest.raises(StudyError, match="random weights"):
        study.ablate(random, IDS, "q", progress=SILENT)


def test_options_that_do_not_go_together(model: Any) -> None:
    with pytest.raises(OptionError, match="just one"):
        study.ablate(model, IDS, "q", plan="grid")
    with pytest.raises(OptionError, match="just one"):
        study.ablate(model, IDS, "q", by="role")
    with pytest.raises(OptionError, match="not scored"):
        study.sensitivity(model, IDS, activations="int8")
    with pytest.raises(OptionError, match="measure 'none' and 'int8'"):
        study.ablate(model, IDS, "all", activations="auto")
    with pytest.raises(OptionError, match="need the model's tokenizer"):
        study.tasks(model, "arc_easy")
    with pytest.raises(OptionError, match=r"W4A4\), 'int8'"):
        study.ablate(model, IDS, "q", activations="W4A4")
    with pytest.raises(StudyError, match="no picture"):
        study.latency(model.requires_grad_(False), "q", inner="eager", prompt_tokens=2,
                      new_tokens=2, rounds=1).draw("x.png")  # type: ignore[arg-type]  # fmt: skip


def test_int8_activations_are_measured(model: Any) -> None:
    table = study.ablate(model, IDS, "all", activations=["none", "int8"])
    weights, both = table[1:]
    assert both.activation_mode == "W4A8"
    assert 0 < abs(both.kl - weights.kl) < 0.1 * weights.kl


def test_a_budget_leaves_trials_and_says_so(model: Any, tmp_path: Path) -> None:
    table = study.ablate(model, IDS, by="role", budget=1e-9, out=tmp_path)
    assert len(table) == 1
    assert "7 trials are left: the same command goes on with them" in table.verdict
    assert len(study.ablate(model, IDS, by="role", out=tmp_path)) == 8
