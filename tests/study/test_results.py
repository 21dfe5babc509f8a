"""A folder of results: what several commands measured gathers in it, and is shown from it."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner
from support.models import tiny, tokens
from support.trials import row

import fp4graph
from fp4graph import SelectorError, StudyError
from fp4graph.cli import main
from fp4graph.study.results import Wanted, open_results, records, show, write
from fp4graph.study.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from fp4graph.study import Table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commands on one text, one on another."""
    out = tmp_path_factory.mktemp("results")
    model = tiny("llama").requires_grad_(False)
    ids = tokens(16, batch=4)
    ablate = fp4graph.study.ablate
    ablate(model, ids, by="role", out=out, corpus="wiki")
    ablate(model, ids, ["attn", "mlp"], "mxfp4", out=out, name="attention", corpus="wiki")
    ablate(model, tokens(16, batch=4, seed=5), "q", out=out, corpus="other")
    return out


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown(folder: Path, **wanted: object) -> list[Table]:
    return show(open_results(folder), Wanted(**wanted))  # type: ignore[arg-type]


def test_results_gather_and_runs_are_a_log(folder: Path) -> None:
    found = lines(folder / "ablation.jsonl")
    assert len(found) == 1 + 7 + 2 + 2
    assert [run["corpus"] for run in lines(folder / "runs.jsonl")] == ["wiki", "wiki", "other"]
    assert [run["run"] for run in lines(folder / "runs.jsonl")] == [1, 2, 3]
    assert (folder / "ablation.png").read_bytes().startswith(b"\x89PNG")
    attention = next(each for each in found if each["selector"] == "attn")
    assert (attention["name"], attention["format"]) == ("attention", "mxfp4")


def test_rows_say_where_they_are_from(folder: Path, tmp_path: Path) -> None:
    rows = records(open_results(folder).all())
    assert {each["corpus"] for each in rows} == {"wiki", "other"}
    assert {each["model_name"] for each in rows} == {"LlamaForCausalLM"}
    for each in rows:
        assert each["scored_tokens"] == 60
        assert str(each["date"]).startswith("20")
        assert each["machine"]
        assert isinstance(each["command"], str)
    path = tmp_path / "all.csv"
    from fp4graph.study.export import export

    export(rows, path)
    with path.open() as file:
        assert {each["corpus"] for each in csv.DictReader(file)} == {"wiki", "other"}


def test_dtypes_are_studies_of_their_own(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama").to(dtype).requires_grad_(False)
        fp4graph.study.ablate(model, tokens(16, batch=2), "q", out=tmp_path, corpus="wiki")
    assert len(shown(tmp_path)) == 2
    (only,) = shown(tmp_path, dtype=("bfloat16",))
    assert "bfloat16" in only.view.title
    only.draw(tmp_path / "one.svg")
    words = CliRunner().invoke(main, ["show", str(tmp_path), "--picture", str(tmp_path / "a.svg")])
    assert words.exit_code == 2
    assert "--dtype" in words.stderr


def test_a_table_for_each_model_and_text(folder: Path) -> None:
    first, second = shown(folder)
    assert len(first) == 10
    assert [each.selector for each in second] == ["none", "q"]
    assert "LlamaForCausalLM, wiki, 60 tokens, float32" in str(first)
    assert "other" in str(second)


@pytest.mark.parametrize(
    "wanted, selectors",
    [
        ({"format": ("mxfp4",)}, {"attn", "mlp"}),
        ({"select": ("attention",)}, {"attn"}),
        ({"select": ("*n",), "corpus": ("wiki",)}, {"attn", "down"} | {"attn"}),
        ({"by": ("role",), "corpus": ("wik*",)}, {"q", "k", "v", "o", "gate", "up", "down"}),
        ({"by": ("other",)}, {"attn", "mlp"}),
        ({"corpus": ("other",)}, {"q"}),
    ],
)
def test_any_selection_of_trials(
    folder: Path, wanted: dict[str, object], selectors: set[str]
) -> None:
    (table,) = shown(folder, **wanted)
    assert {each.selector for each in table if not each.is_dense} == selectors
    assert table[0].is_dense


def test_no_such_trial_says_which_there_are(folder: Path) -> None:
    with pytest.raises(
        SelectorError, match="there are none, q, k, v, o, gate, up, down, attention"
    ):
        shown(folder, select=("blocks=7",))
    with pytest.raises(StudyError, match="there are no results"):
        open_results(folder / "nowhere")


def test_pictures_are_drawn_again_from_the_store(folder: Path, tmp_path: Path) -> None:
    (table,) = shown(folder, format=("mxfp4",))
    table.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_a_store_of_before_has_no_names(tmp_path: Path) -> None:
    store = Store(tmp_path / "trials.sqlite")
    store.put({"protocol": 2, "model": "m", "text": "t", "dtype": "torch.float32"}, row("q", 1.0))
    (record,) = records(store.all())
    assert (record["corpus"], record["name"], record["kl"]) == (None, "", 1.0)
    (table,) = show(store)
    assert "model m, text t" in str(table)
    write(store, tmp_path)
    assert len(lines(tmp_path / "ablation.jsonl")) == 1


def test_the_picture_is_of_what_was_measured_last(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(
        "fp4graph.study.results.draw", lambda rows, title, path: titles.append(title)
    )
    store = Store(tmp_path / "trials.sqlite")
    for number, text in enumerate("aba"):
        identity = {"protocol": 2, "model": "m", "text": text, "dtype": "torch.float32"}
        store.put({**identity, "selector": str(number)}, row("q", 1.0))
    write(store, tmp_path)
    assert titles == ["model m, text a, float32"]
