"""The commands: what they print, where, and how they fail."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import signal
from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from support.command import Command

from fp4graph.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ABLATE_KEYS = (
    "selector format activations quantizer direction ppl dnll dnll_se kl kl_se top1 "
    "linears parameters bytes_dense bytes_packed dnll_per_mb dnll_low dnll_high kl_p50 kl_p90 "
    "kl_p99 kl_per_mb dnll_per_mparam kl_per_mparam noise noise_se "
    "probe probe_same name"
)
LATENCY_KEYS = (
    "selector format inner ttft_s prefill_tokens_per_s decode_tokens_per_s per_token_ms "
    "compile_s weight_bytes resident_rss peak_rss gb_per_s recompiles graph_breaks"
)
INSPECT_KEYS = (
    "path role block shape selected kernel reason bytes_dense bytes_packed layout tile why "
    "stack expert rows merged"
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def rows(result: Result) -> list[dict[str, object]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_inspect_json(tiny_folder: Path) -> None:
    found = rows(run("inspect", str(tiny_folder), "--select", "attn,blocks>0", "--json"))
    assert len(found) == 15
    assert all(list(row) == INSPECT_KEYS.split() for row in found)
    picked = [row for row in found if row["selected"]]
    assert {row["role"] for row in picked} == {"q", "k", "v", "o"}
    assert {row["block"] for row in picked} == {1}
    assert all(row["kernel"] == "cpu" for row in picked)


def test_inspect_table(tiny_folder: Path) -> None:
    inspect = ["inspect", str(tiny_folder), "--select", "down", "--format", "mxfp4"]
    result = run(*inspect)
    assert result.exit_code == 0
    assert "0..1" in result.stdout
    assert "down_proj" not in result.stdout
    assert "model.layers.0.mlp.down_proj" in run(*inspect, "--linears").stdout
    assert "`down` as mxfp4 W4A16" in result.stdout
    assert "2 of 15 linears in FP4" in result.stdout
    assert "mxfp4 W4A16, rtn@32" in run(*inspect, "--quantizer", "rtn@32").stdout


@pytest.mark.slow
@pytest.mark.parametrize("select", ["atn", "blocks>99", "q &"])
def test_a_bad_selector_exits_2_with_one_line(tiny_folder: Path, select: str) -> None:
    code, out, errors = Command("inspect", str(tiny_folder), "--select", select).wait()
    assert code == 2
    assert out == ""
    lines = [line for line in errors.splitlines() if line.startswith("fp4graph:")]
    assert len(lines) == 1
    assert f"selector {select!r}, column" in lines[0]
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["inspect", "no/such-model"], "cannot load"),
        (["inspect", "{model}", "--format", "fp5"], "formats are"),
        (["inspect", "{model}", "--kernel", "warp"], "kernels are"),
        (["ablate", "{model}"], "just one"),
        (["ablate", "{model}", "--select", "q", "--by", "role"], "just one"),
        (["ablate", "{model}", "--select", "q", "--plan", "grid"], "just one"),
        (["ablate", "{model}", "--plan", "rolls"], "expected roles, blocks, grid"),
        (["ablate", "{model}", "--select", "atn"], "did you mean 'attn'"),
        (["ablate", "{model}", "--by", "layer"], "expected role, block"),
        (["ablate", "{model}", "--by", "role", "--format", "nvfp5"], "formats are"),
        (["ablate", "{model}", "--by", "role", "--activations", "W4A4"], "'same' (W4A4)"),
        (["ablate", "{model}", "--by", "role", "--corpus", "/none"], "cannot read corpus"),
        (["ablate", "{model}", "--by", "role", "--tokens", "9999999"], "fewer than"),
        (
            ["ablate", "{model}", "--select", "qkv", "--tokens", "32", "--seq-len", "16"],
            "matches nothing",
        ),
        (
            ["ablate", "{model}", "--select", "q", "--tokens", "512", "--seq-len", "200"],
            "128 positions",
        ),
        (["latency", "{model}", "--select", "q", "--prompt-tokens", "999"], "128 positions"),
        (["ablate", "qwen2.5-0.5b-random", "--by", "role"], "random weights"),
        (["latency", "{model}", "--select", "atn"], "did you mean 'attn'"),
        (["latency", "{model}", "--select", "q", "--quantizer", "best"], "unknown quantizer"),
        (["latency", "{model}", "--select", "q", "--device", "gpu"], "expected cpu, cuda"),
        (["latency", "{model}", "--select", "q", "--device", "cuda:99"], "torch sees"),
        (
            ["latency", "{model}", "--select", "q", "--inner", "eager", "--mode", "max-autotune"],
            "is for --inner inductor",
        ),
    ],
)
def test_errors_are_one_line_and_exit_2(
    tiny_folder: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    arguments = [argument.format(model=tiny_folder) for argument in arguments]
    if arguments[0] == "ablate":
        arguments += ["--out", str(tmp_path)]
    result = run(*arguments)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if words in line]
    assert line.startswith(("fp4graph: ", "Error: "))


@pytest.mark.parametrize(
    "error, code, words",
    [
        (KeyError("x"), 1, "a fault of fp4graph's or of the model's code (KeyError: 'x')"),
        (OSError(28, "No space left on device", "out/run.json"), 2, "No space left on device"),
        (MemoryError("3 GB"), 1, "not enough memory: 3 GB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "not enough memory"),
    ],
)
def test_no_command_ends_in_a_traceback(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("fp4graph.models.outline", fail)
    result = CliRunner().invoke(main, ["inspect", str(tiny_folder)], catch_exceptions=False)
    assert result.exit_code == code
    assert words in result.output
    assert "Traceback" not in result.output
    loud = CliRunner().invoke(main, ["-v", "inspect", str(tiny_folder)], catch_exceptions=False)
    assert loud.exit_code == code


def test_ablate(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = [
        "ablate", str(tiny_folder), "--by", "role", "--direction", "both",
        "--format", "nvfp4,mxfp4", "--activations", "none,same",
        "--tokens", "64", "--seq-len", "16",
        "--out", str(tmp_path / "o"),
    ]  # fmt: skip
    found = rows(run(*arguments, "--json"))
    assert all(list(row) == ABLATE_KEYS.split() for row in found)
    assert found[0]["selector"] == "none"
    assert len(found) == 1 + 2 * 2 * (7 + 1 + 7)
    written = [
        json.loads(line) for line in (tmp_path / "o" / "ablation.jsonl").read_text().splitlines()
    ]
    assert [{key: row[key] for key in found[0]} for row in written] == found
    assert {row["corpus"] for row in written} == {"pydoc"}
    assert {row["model_name"] for row in written} == {str(tiny_folder)}
    assert (tmp_path / "o" / "ablation.png").stat().st_size > 10_000
    provenance = json.loads((tmp_path / "o" / "runs.jsonl").read_text())
    assert provenance["scored_tokens"] == 60
    table = run(*arguments)
    assert table.exit_code == 0
    assert "all but down" in table.stdout
    lines = [line.split("W4A4") for line in table.stdout.splitlines()]
    damage = [float(line[1].split()[0]) for line in lines if len(line) == 2 and line[0][0] != "="]
    assert len(damage) > 10
    assert damage == sorted(damage, reverse=True), "by KL, the most damaging first"


def test_ablate_takes_selectors_and_a_text(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox " * 20)
    found = rows(run(
        "ablate", str(tiny_folder), "--select", "down,blocks<1", "--select", "all | lm_head",
        "--corpus", str(text), "--tokens", "60", "--seq-len", "30",
        "--out", str(tmp_path / "o"), "--json",
    ))  # fmt: skip
    assert [row["selector"] for row in found] == ["none", "down,blocks<1", "all | lm_head"]
    assert [row["linears"] for row in found] == [0, 1, 15]


@pytest.mark.slow
def test_latency(tiny_folder: Path) -> None:
    arguments = [
        "latency", str(tiny_folder), "--select", "all", "--select", "attn", "--inner", "eager",
        "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "2", "--quantizer", "rtn,rtn@16",
        "--no-memory",
    ]  # fmt: skip
    found = rows(run(*arguments, "--json"))
    assert [(row["selector"], row["quantizer"]) for row in found] == [
        ("none", "rtn"), ("all", "rtn"), ("all", "rtn@16"), ("attn", "rtn"), ("attn", "rtn@16"),
    ]  # fmt: skip
    assert all(set(LATENCY_KEYS.split()) <= set(row) for row in found)
    table = run(
        "latency", str(tiny_folder), "--select", "attn", "--inner", "eager", "--prompt-tokens", "4",
        "--new-tokens", "2", "--rounds", "1",
    )  # fmt: skip
    assert "decode ratio" in table.stdout


def broken(folder: Path, copy: Path, change: Callable[[torch.nn.Module], object]) -> str:
    """Copy a model's folder, its weights changed."""
    shutil.copytree(folder, copy)
    model = transformers.AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        change(model)
    model.save_pretrained(copy)
    return str(copy)


def test_a_model_whose_logits_are_nan_is_one_error(tiny_folder: Path, tmp_path: Path) -> None:
    model = broken(tiny_folder, tmp_path / "m", lambda m: m.model.norm.weight.fill_(math.nan))
    result = run(
        "ablate", model, "--select", "q", "--tokens", "32", "--seq-len", "16",
        "--out", str(tmp_path / "o"), "--json",
    )  # fmt: skip
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "fp4graph: the dense model: its logits hold NaN" in result.stderr


def test_a_model_beyond_all_perplexity_is_measured(tiny_folder: Path, tmp_path: Path) -> None:
    model = broken(tiny_folder, tmp_path / "m", lambda m: m.lm_head.weight.mul_(1e6))
    arguments = [
        "ablate", model, "--select", "q", "--tokens", "32", "--seq-len", "16",
        "--out", str(tmp_path / "o"),
    ]  # fmt: skip
    assert [row["ppl"] for row in rows(run(*arguments, "--json"))] == [None, None]
    assert "> 1e308" in run(*arguments).stdout


@pytest.mark.parametrize(
    "family",
    ["qwen2", *(pytest.param(f, marks=pytest.mark.slow) for f in
                ("gpt2", "opt", "phi3", "gemma3", "mixtral"))],
)  # fmt: skip
def test_ablate_and_latency_on_every_kind_of_model(
    folder_of: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    folder = str(folder_of(family))
    damage = rows(run(
        "ablate", folder, "--select", "attn", "--activations", "none,same",
        "--tokens", "64", "--seq-len", "16", "--out", str(tmp_path), "--json",
    ))  # fmt: skip
    assert [row["selector"] for row in damage] == ["none", "attn", "attn"]
    assert all(row["kl"] > 0 for row in damage[1:])
    if family in ("gpt2", "gemma3"):
        return  # test_latency.py has these
    speed = rows(run(
        "latency", folder, "--select", "attn", "--inner", "eager", "--no-memory",
        "--prompt-tokens", "4", "--new-tokens", "2", "--rounds", "1", "--json",
    ))  # fmt: skip
    assert [row["selector"] for row in speed] == ["none", "attn"]


@pytest.mark.slow
def test_verbose_logs_passes(tiny_folder: Path) -> None:
    code, _, errors = Command("-v", "inspect", str(tiny_folder), "--json").wait()
    assert code == 0
    assert re.search(r"fp4graph\.passes: graph \d+, tag:", errors)


def test_an_interrupt_that_python_dropped_counts() -> None:
    from fp4graph.cli import common

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with common.readable_errors(), contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # as in a finalizer, whose exceptions go nowhere
    with pytest.raises(KeyboardInterrupt):
        common.check_interrupt()
    with common.readable_errors():
        common.check_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_doctor_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {row["what"]: row for row in rows(run("doctor", "--json"))}
    assert all(list(row) == ["what", "found", "advice"] for row in found.values())
    assert "GB free of" in found["memory"]["found"]
    assert found["lm_eval"]["found"] == version("lm_eval")
    assert str(torch.get_num_threads()) in found["threads"]["found"]
    assert "native CPU kernels" in run("doctor").stdout
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "/nowhere")
    found = {row["what"]: row for row in rows(run("doctor", "--json"))}
    assert "apt install g++" in found["C++ compiler"]["advice"]


def test_help_names_the_commands() -> None:
    text = run("--help").stdout
    assert all(name in text for name in ("doctor", "inspect", "ablate", "latency"))
