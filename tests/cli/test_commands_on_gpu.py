"""The commands on a GPU, where there is one: the same numbers as on a CPU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner

from fp4graph import Calibration, models
from fp4graph.cli import main

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")

WINDOWS = ("--tokens", "64", "--seq-len", "16")


def rows(*arguments: str) -> list[dict[str, object]]:
    result = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_model_is_the_same_one(tiny_folder: Path) -> None:
    on_gpu = models.load(str(tiny_folder), device="cuda")
    assert on_gpu.device.type == "cuda"
    assert on_gpu.revision() == models.load(str(tiny_folder)).revision()


@pytest.mark.parametrize(
    "command",
    [
        ("ablate", "--by", "role", "--activations", "none,same", "--format", "nvfp4,mxfp4"),
        ("ablate", "--select", "all", "--quantizer", "scale-search@16"),
        ("outliers",),
        ("sensitivity", "--activations", "none,same"),
    ],
    ids=lambda command: command[0],
)
def test_numbers_are_those_of_a_cpu(
    command: tuple[str, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    name, *options = command
    out = ["--out", str(tmp_path)] if name == "ablate" else []
    found = {
        device: rows(name, str(tiny_folder), *options, *WINDOWS, *out, "--device", device)
        for device in ("cpu", "cuda")
    }
    assert len(found["cpu"]) > 1
    for cpu, cuda in zip(found["cpu"], found["cuda"], strict=True):
        assert _close(cpu, cuda)


def _close(cpu: object, cuda: object) -> bool:
    if isinstance(cpu, dict) and isinstance(cuda, dict):
        return all(_close(each, cuda[key]) for key, each in cpu.items())
    return cpu == cuda if not isinstance(cpu, float) else cuda == pytest.approx(cpu, 0.02, 2e-5)


@pytest.mark.parametrize("quantizer", ["gptq:scale-search+smooth", "mr-gptq", "learned"])
def test_calibrate_then_ablate(quantizer: str, tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["calibrate", str(tiny_folder), "--quantizer", quantizer, "--format", "mxfp4"]
    arguments += ["--samples", "8", "--seq-len", "16", "--dtype", "bfloat16"]
    errors = []
    for device in ("cpu", "cuda"):
        file = tmp_path / f"{device}.safetensors"
        made = CliRunner().invoke(main, [*arguments, "--out", str(file), "--device", device])
        assert made.exit_code == 0, made.output
        found = Calibration.load(file).about["output_error"].values()
        errors.append(sum(error for _, error in found))
    # GPTQ carries each rounding on: sums in another order give other codes, as good as these
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    dense, row = rows(
        "ablate", str(tiny_folder), "--select", "all", "--calibration", str(file),
        "--device", "cuda", "--dtype", "bfloat16", *WINDOWS, "--out", str(tmp_path / "o"),
    )  # fmt: skip
    assert dense["kl"] == 0
    assert row["linears"] == 14
    assert 0 < row["kl"] < 1


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_latency(mode: str, tiny_folder: Path) -> None:
    dense, row = rows(
        "latency", str(tiny_folder), "--select", "all", "--dtype", "bfloat16", "--device", "cuda",
        "--mode", mode, "--prompt-tokens", "8", "--new-tokens", "6", "--rounds", "2",
    )  # fmt: skip
    assert (dense["format"], row["format"]) == (None, "nvfp4")
    assert row["recompiles"] == 0
