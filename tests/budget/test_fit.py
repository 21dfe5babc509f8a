"""`fp4graph fit`: every step leaves its file, and a run that was stopped goes on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner

import fp4graph
from fp4graph import Policy, Scheme
from fp4graph.budget import fit as module
from fp4graph.budget import times
from fp4graph.cli import main
from fp4graph.study.plan import read_mix

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

SIZES = ("--tokens", "64", "--samples", "4", "--seq-len", "32", "--verify-tokens", "128")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP4GRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(times, "_POOL_BYTES", 1e5)


def fit(folder: Path, out: Path, *options: str) -> Result:
    budget = () if "--kl" in options else ("--bits", "6")
    arguments = ["fit", str(folder), *budget, *SIZES, "--out", str(out), *options]
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("options", [(), ("--activations", "same", "--to", "modelopt")])
def test_from_a_model_to_a_checkpoint(
    folder_of: Any, tmp_path: Path, options: tuple[str, ...]
) -> None:
    folder, out = folder_of("llama"), tmp_path / "out"
    result = fit(folder, out, *options)
    assert result.exit_code == 0, result.output
    assert "forecast: about" in result.stderr
    policy = Policy.read(read_mix(out / "policy.toml")[0], Scheme())
    model = fp4graph.load(str(out / "checkpoint"))
    runs = {row.path: row.reason for row in fp4graph.report_of(model).selected}
    report = fp4graph.explain(
        fp4graph.models.load(str(folder)).model, torch.arange(8)[None], select="all"
    )
    assert set(runs) == {row.path for row in report.selected}
    assert {str(scheme.format) for scheme in policy.schemes} == {"nvfp4", "fp8"}
    plan = json.loads((out / "plan.json").read_text())
    assert 5.0 < plan["bits"] <= 6.0
    summary = (out / "summary.md").read_text()
    assert summary.strip() == result.stdout.strip()
    for said in ("What was chosen", "What it saves", "What it costs", "How sure", "Beside it, all"):
        assert said in summary
    assert "vllm 0.33.0 loads it as it is" in summary
    command = next(line for line in summary.splitlines() if line.startswith("    fp4graph policy"))
    again = [*command.split()[1:-1], str(tmp_path / "again.toml")]
    done = CliRunner().invoke(main, again, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert Policy.read(read_mix(tmp_path / "again.toml")[0], Scheme()) == policy


def test_a_run_that_was_stopped_goes_on(
    folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = folder_of("llama"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, "export", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert fit(folder, out).exit_code == 130
    assert (out / "calibration.safetensors").is_file()
    assert not (out / "checkpoint").exists()
    with monkeypatch.context() as patch:
        for name in ("search", "write_policy"):
            patch.setattr(module, name, lambda *_, **__: pytest.fail("it was done before"))
        patch.setattr(module.fp4graph, "calibrate", lambda *_, **__: pytest.fail("it was done"))
        first = fit(folder, out)
        assert first.exit_code == 0, first.output
        patch.setattr(module, "export", lambda *_, **__: pytest.fail("it was done before"))
        again = fit(folder, out)
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert "(4 kept)" in again.stderr or "nothing to run" in again.stderr
    other = fit(folder, out, "--format", "nvfp4,mxfp4")
    assert other.exit_code == 2
    assert "is of another wish (formats ['nvfp4', 'fp8'])" in other.output
    longer = fit(folder, out, "--samples", "5")
    assert longer.exit_code == 2
    assert "is of another wish (texts " in longer.output


def test_what_cannot_be_is_said_at_once(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("llama")
    for options, message in (
        (("--verify-corpus", "pydoc"), "codes are found with that text"),
        (("--kl", "-1"), "expected a number above zero"),
        (("--format", "fp5"), "unknown format"),
    ):
        result = fit(folder, tmp_path / "none", *options)
        assert result.exit_code == 2
        assert message in result.output
    assert not (tmp_path / "none").exists()
    random = CliRunner().invoke(main, ["fit", "qwen2.5-0.5b-random", "--bits", "5", "--out", "x"])
    assert "has random weights" in random.output
