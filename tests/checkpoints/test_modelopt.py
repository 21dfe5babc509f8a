"""What ModelOpt's own package wrote (bench/modelopt/make.py) runs here, code for code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import fp4graph
from fp4graph.cli import main

FOLDER = Path(__file__).parent / "modelopt"
IDS = torch.arange(24).reshape(2, 12)


def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / name / "model.safetensors")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits.float()


@pytest.mark.parametrize(
    "name, scheme",
    [
        ("nvfp4", "nvfp4 W4A4"),
        ("w4a16-nvfp4", "nvfp4 W4A16"),
        ("fp8", "fp8 W8A8"),
        ("fp8-per-channel", "fp8 W8A8"),
    ],
)
def test_every_code_and_scale_is_theirs(name: str, scheme: str) -> None:
    theirs, model = tensors(name), fp4graph.load(str(FOLDER / name))
    report = fp4graph.report_of(model).selected
    assert all(f" as {scheme}" in row.reason for row in report)
    assert len(report) == 7
    for row in report:
        packed = model.get_submodule(row.path).packed
        assert torch.equal(packed.qdata, theirs[f"{row.path}.weight"].view(torch.uint8))
        scale = theirs[f"{row.path}.weight_scale"]
        if packed.format.base == "fp8":
            assert torch.equal(packed.scale.flatten(), scale.flatten().expand(len(packed.scale)))
        else:
            assert torch.equal(packed.scale.view(torch.uint8), scale.view(torch.uint8))
            assert torch.equal(packed.per_tensor_scale, theirs[f"{row.path}.weight_scale_2"])
    dense = logits(fp4graph.models.load(str(FOLDER / "dense"), torch.bfloat16).model)
    error = (logits(model) - dense).norm() / dense.norm()
    assert 0.001 < error < (0.12 if "fp8" in name else 0.5)


@pytest.mark.parametrize(
    "name, options",
    [
        ("w4a16-nvfp4", ()),
        ("fp8-per-channel", ("--format", "fp8", "--activations", "same")),
    ],
)
def test_our_export_is_what_theirs_is(name: str, options: tuple[str, ...], tmp_path: Path) -> None:
    arguments = ["export", str(FOLDER / "dense"), "--to", "modelopt", "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(main, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    theirs, ours = tensors(name), load_file(tmp_path / "o" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype
        assert tensor.shape == ours[key].shape
        if key.endswith(("scale_2", "norm.weight")):
            assert torch.equal(tensor, ours[key])
    codes = [key for key in theirs if key.endswith("proj.weight")]
    same = [
        (theirs[key].view(torch.uint8) == ours[key].view(torch.uint8)).float().mean()
        for key in codes
    ]
    assert min(same) > 0.98  # they scale in another order, so that what is near a tie differs
    config = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    known = json.loads((FOLDER / name / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == known["quant_algo"]
    check = CliRunner().invoke(main, ["check-serve", str(tmp_path / "o"), "--engine", "vllm"])
    assert check.exit_code == 0, check.output


def test_fp8_of_weights_alone_is_refused_for_modelopt(tmp_path: Path) -> None:
    arguments = ["export", str(FOLDER / "dense"), "--to", "modelopt", "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(main, [*arguments, "--format", "fp8"])
    assert result.exit_code == 2
    assert "no fp8 W8A16 that engines load" in result.output
