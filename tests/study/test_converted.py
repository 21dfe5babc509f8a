"""Studies of models that own their packed weights."""

from __future__ import annotations

import copy
import json
import pickle
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.calibration import BATCHES
from support.models import tiny, tokens

import fp4graph
from fp4graph import ModelError
from fp4graph.cli import main
from fp4graph.study import ablate, latency

if TYPE_CHECKING:
    from pathlib import Path

WINDOWS = tokens(64).reshape(4, 16)
QUIET = ("--tokens", "64", "--seq-len", "16", "--json")


def run(*arguments: str) -> list[dict[str, object]]:
    done = CliRunner().invoke(main, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_converted_model_is_measured_as_it_is(tmp_path: Path) -> None:
    dense = tiny("llama").requires_grad_(False)
    model = copy.deepcopy(dense)
    fp4graph.convert(model, {"all": "nvfp4", "v": None})
    table = ablate(dense, WINDOWS, {"all": "nvfp4", "v": None}, packed=model, out=tmp_path)
    zero, selected, own = table
    assert zero.is_dense
    assert own.kl == selected.kl > 0
    assert own.linears == selected.linears
    assert own.bytes_packed == selected.bytes_packed
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    _, changed = ablate(dense, WINDOWS, packed=model, out=tmp_path)
    assert changed.kl != own.kl, "another model has a row of its own"
    with pytest.raises(ModelError, match="was not converted"):
        ablate(dense, WINDOWS, packed=dense)
    (_, timed) = latency(
        dense, packed=model, inner="eager", prompt_tokens=4, new_tokens=3, rounds=1
    )
    assert timed.weight_bytes < 0.5 * sum(each.nbytes for each in dense.parameters())
    assert timed.resident_rss is None


@pytest.mark.slow
def test_commands_take_a_converted_folder(tiny_folder: Path, tmp_path: Path) -> None:
    packed, out = tmp_path / "packed", tmp_path / "out"
    done = CliRunner().invoke(main, ["convert", str(tiny_folder), "--out", str(packed)])
    assert done.exit_code == 0, done.output
    zero, own = run("ablate", packed, "--out", out, *QUIET)
    assert zero["format"] is None
    assert own["name"] == "packed"
    _, selected = run("ablate", tiny_folder, "--select", "all", "--out", out, *QUIET)
    assert own["kl"] == selected["kl"] > 0
    again, _ = run("ablate", packed, "--dense", tiny_folder, "--out", out, *QUIET)
    assert again == zero
    short = ("--inner", "eager", "--prompt-tokens", "4", "--new-tokens", "3", "--rounds", "1")
    zero, own = run("latency", packed, *short, "--json")
    assert own["weight_bytes"] < zero["weight_bytes"]
    assert 0 < own["resident_rss"] <= own["peak_rss"]
    for arguments, problem in (
        (("ablate", tiny_folder, "--select", "all", "--dense", packed), "is dense itself"),
        (("latency", packed, "--dense", tmp_path / "nowhere"), "there is no folder"),
    ):
        done = CliRunner().invoke(main, [str(each) for each in arguments])
        assert done.exit_code == 2
        assert problem in done.stderr
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["dense"] = ""
    (packed / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(main, ["ablate", str(packed)])
    assert "does not say what it was converted from: give --dense MODEL" in done.stderr


@pytest.mark.slow
def test_other_codes_are_noticed(tiny_folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    CliRunner().invoke(main, ["convert", str(tiny_folder), "--out", str(packed)])
    _, before = run("ablate", packed, "--out", tmp_path / "out", *QUIET)
    file = packed / "model.safetensors"
    tensors = load_file(file)
    name = next(each for each in tensors if each.endswith("down_proj.qdata"))
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, file, metadata={"format": "pt"})
    _, after = run("ablate", packed, "--out", tmp_path / "out", *QUIET)
    assert after["kl"] != before["kl"]


def test_a_calibration_can_be_pickled() -> None:
    model = tiny("llama").requires_grad_(False)
    codes = fp4graph.calibrate(model, BATCHES, quantizer="gptq")
    again = pickle.loads(pickle.dumps(codes))
    assert again.digest() == codes.digest()
    assert copy.deepcopy(codes).digest() == codes.digest()
