"""The commands of a study: plans, exports, protocols, calibrations, outliers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from fp4graph.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def rows(result: Result) -> list[dict[str, object]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_plan_and_its_results_for_other_programs(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = [
        "ablate", str(tiny_folder), "--plan", "grid", "--format", "mxfp4", "--budget", "5",
        "--tokens", "64", "--seq-len", "16", "--out", str(tmp_path),
    ]  # fmt: skip
    found = rows(run(*arguments, "--json"))
    assert {row["format"] for row in found} == {None, "mxfp4"}
    assert len(found) == 1 + 14
    result = run("export-results", str(tmp_path), str(tmp_path / "all.csv"))
    assert "15 trials" in result.stdout
    head, *lines = (tmp_path / "all.csv").read_text().splitlines()
    assert len(lines) == 15
    assert {"model", "text", "torch", "selector", "dnll", "kl_p99"} <= set(head.split(","))
    assert run("export-results", str(tmp_path / "none"), "a.csv").exit_code == 2


def test_a_model_that_is_not_there_leaves_no_results(tmp_path: Path) -> None:
    result = run("ablate", "no/such-model", "--select", "all", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "cannot load" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_calibrate_then_ablate(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    made = run(
        "calibrate", str(tiny_folder), "--format", "mxfp4", "--quantizer", "gptq",
        "--samples", "8", "--seq-len", "16", "--out", str(out),
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "14 linears, mxfp4, gptq" in made.stdout
    common = [
        "ablate", str(tiny_folder), "--select", "all", "--calibration", str(out),
        "--tokens", "64", "--seq-len", "16", "--out", str(tmp_path / "o"), "--json",
    ]  # fmt: skip
    found = rows(run(*common))
    assert [(row["format"], row["quantizer"]) for row in found] == [
        (None, "rtn"),
        ("mxfp4", "gptq"),
    ]
    assert json.loads((tmp_path / "o" / "runs.jsonl").read_text())["corpus"] == "pydoc-second"
    both = rows(run(*common, "--quantizer", "rtn,gptq"))
    assert [row["quantizer"] for row in both] == ["rtn", "rtn", "gptq"]
    same = run(*common, "--corpus", "pydoc-first")
    assert same.exit_code == 2
    assert "the text to measure on is the one that was calibrated with" in same.stderr


def test_the_protocol_of_wikitext2_takes_the_whole_text(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 20, encoding="utf-8")
    arguments = ["ablate", str(tiny_folder), "--select", "q", "--protocol", "wikitext2"]
    arguments += ["--corpus", str(text), "--out", str(tmp_path / "o")]
    result = run(*arguments)
    assert result.exit_code == 2, "160 tokens fill no window of 2048"
    assert "160 tokens in windows of 2048" in result.stderr
    assert run(*arguments, "--seq-len", "64").exit_code == 0
    assert json.loads((tmp_path / "o" / "runs.jsonl").read_text())["windows"] == 2


def test_outliers_by_role(tiny_folder: Path) -> None:
    arguments = ["outliers", str(tiny_folder), "--tokens", "64", "--seq-len", "16"]
    found = rows(run(*arguments, "--json"))
    assert len(found) == 15
    assert set(found[0]) == {"path", "role", "block", "shape", "tokens", "input", "weight"}
    assert set(found[0]["input"]) == {  # type: ignore[arg-type]
        "p999", "max", "ratio", "kurtosis", "rms", "outlier_channels",
    }  # fmt: skip
    table = run(*arguments)
    assert "max/P99.9" in table.stdout
    assert "down" in table.stdout


def test_what_needs_a_trained_model_says_so(tmp_path: Path) -> None:
    for command in ("calibrate", "outliers"):
        out = ["--out", str(tmp_path / "c.safetensors")] if command == "calibrate" else []
        result = run(command, "qwen2.5-0.5b-random", *out)
        assert result.exit_code == 2
        assert "random weights" in result.stderr


def test_scores_and_sums_beside_what_was_measured(tiny_folder: Path, tmp_path: Path) -> None:
    text = ["--tokens", "64", "--seq-len", "16"]
    folder, out = str(tiny_folder), str(tmp_path)
    ablate = ["ablate", folder, *text, "--out", out]
    assert run(*ablate, "--select", "q").exit_code == 0
    lacking = run("additivity", folder, out)
    assert lacking.exit_code == 2
    assert "there is no trial of a single linear; `ablate --plan grid`" in lacking.stderr
    assert run(*ablate, "--plan", "grid").exit_code == 0
    assert run(*ablate, "--plan", "roles", "--direction", "both").exit_code == 0
    assert run(*ablate, "--plan", "roles", "--tokens", "80").exit_code == 0, "another text"
    pictures = {name: tmp_path / f"{name}.png" for name in ("scores", "cells", "outliers", "sums")}
    sensitivity = ["sensitivity", folder, *text, "--samples", "2", "--json", "--picture"]
    assert len(rows(run(*sensitivity, str(pictures["cells"])))) == 14
    found = rows(run(*sensitivity, str(pictures["scores"]), "--against", out))
    assert len([row for row in found if "sqnr" in row]) == 14
    scores = {(row["predictor"], row["target"]): row for row in found if "spearman" in row}
    assert scores["kl_window", "kl"]["linears"] == 14
    assert ("fisher", "dnll") in scores

    outliers = ["outliers", folder, *text, "--against", out, "--json", "--picture"]
    found = rows(run(*outliers, str(pictures["outliers"])))
    withouts = {row["without"] for row in found if row.get("predictor") == "input ratio"}
    assert withouts == {None, "down"}

    found = rows(run("additivity", folder, out, "--json"))
    everything = next(row for row in found if row.get("name") == "all")
    assert everything["linears"] == 14
    assert any(row.get("second") == "q" and row["first"] == "all but q" for row in found)
    table = run("additivity", folder, out, "--picture", str(pictures["sums"])).stdout
    assert "the largest interactions" in table
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.values())


def test_results_that_are_not_there(tiny_folder: Path, tmp_path: Path) -> None:
    for command in ("sensitivity", "outliers"):
        result = run(command, str(tiny_folder), "--against", str(tmp_path))
        assert result.exit_code == 2
        assert f"there are no results in {tmp_path}" in result.stderr
    assert run("additivity", str(tiny_folder), str(tmp_path)).exit_code == 2
    result = run("outliers", str(tiny_folder), "--picture", str(tmp_path / "a.jpg"))
    assert "expected a name that ends with .png, .svg, .pdf" in result.stderr
