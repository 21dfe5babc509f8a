"""Models that load packed: by name, by transformers' own door, from disk again, by a command."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import ref

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.calibration import BATCHES
from support.models import tiny, tokens

import fp4graph
from fp4graph import FP4Config, ModelError, OptionError, RefusalError, WeightError
from fp4graph.cli import main
from fp4graph.packed.linear import FP4Linear

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

IDS = tokens(16)
WAYS = [
    ("llama", "all", {}),
    ("gpt2", "all | lm_head", {}),
    ("llama", {"all": "nvfp4", "v": None, "down": "mxfp4"}, {}),
    ("qwen3", "attn", {"activations": "same"}),
    ("phi3", "up", {}),
    ("gemma3", "mlp", {"quantizer": "rtn@16"}),
]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "llama", max_shard_size="100KB")
    return tmp_path / "llama"


def untied(report: fp4graph.Report) -> list[fp4graph.LinearRow]:
    """Return rows without the note on tied embeddings: a packed head is tied no more."""
    return [replace(row, reason=row.reason.partition("; the embed")[0]) for row in report]


@pytest.mark.parametrize("family, select, options", WAYS)
def test_from_pretrained_and_back(
    family: str, select: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    tiny(family).save_pretrained(dense)
    auto = transformers.AutoModelForCausalLM
    want = auto.from_pretrained(dense).requires_grad_(False)
    report = fp4graph.convert(want, select, **options)
    model = auto.from_pretrained(dense, quantization_config=FP4Config(select, **options))
    assert torch.equal(logits(model), logits(want))
    assert untied(fp4graph.report_of(model)) == untied(report)
    want.save_pretrained(tmp_path / "converted")
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "converted")), logits(want))
    model.save_pretrained(packed)
    again = auto.from_pretrained(packed)
    assert torch.equal(logits(again), logits(want))
    assert untied(fp4graph.report_of(again)) == untied(report)
    again.save_pretrained(tmp_path / "twice")
    names = sorted(os.listdir(packed))
    assert names == sorted(os.listdir(tmp_path / "twice"))
    one, other = (path / "model.safetensors" for path in (packed, tmp_path / "twice"))
    assert one.read_bytes() == other.read_bytes()


def test_load_takes_what_it_needs(folder: Path, tmp_path: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1, "sharded"
    model = fp4graph.load(str(folder), "attn", dtype=torch.bfloat16)
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(linear, FP4Linear)
    assert linear.dtype == torch.bfloat16
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.bfloat16
    assert not model.training
    model.save_pretrained(tmp_path / "packed")
    again = fp4graph.load(str(tmp_path / "packed"))
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(OptionError, match="say what runs in FP4"):
        fp4graph.load(str(folder))
    with pytest.raises(OptionError, match="packed already"):
        fp4graph.load(str(tmp_path / "packed"), "all")
    with pytest.raises(ModelError, match="there is no folder"):
        fp4graph.load(str(tmp_path / "nowhere"), "all")


def test_one_dense_weight_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp4graph import hf_quantizer

    real, alive = hf_quantizer.packed_module, []
    weights: list[ref[torch.Tensor]] = []

    def counting(model: nn.Module, site: Any, **options: Any) -> FP4Linear:
        weights.append(ref(model.get_submodule(site.tag.fqn).weight))  # type: ignore[arg-type]
        gc.collect()
        alive.append(sum(weight() is not None for weight in weights))
        return real(model, site, **options)

    monkeypatch.setattr(hf_quantizer, "packed_module", counting)
    gc.freeze()  # what other tests left is not looked through fifteen times
    try:
        fp4graph.load(str(folder), "all | lm_head")
    finally:
        gc.unfreeze()
    assert alive == [1] * 15


@pytest.mark.slow
def test_calibrated_codes_are_saved(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    dense = fp4graph.models.LoadedModel("m", tiny("llama").requires_grad_(False), None).model
    fp4graph.calibrate(dense, BATCHES, quantizer="gptq:scale-search+smooth", out=file)
    model = fp4graph.load(str(folder), "all", calibration=file)
    fp4graph.convert(dense, calibration=file)
    assert torch.equal(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "packed")
    file.unlink()
    assert torch.equal(logits(fp4graph.load(str(tmp_path / "packed"))), logits(model))


def test_nothing_is_said_of_what_is_well(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    fp4graph.models.load(str(folder))
    fp4graph.load(str(folder), "all")
    assert [each.getMessage() for each in caplog.records if each.levelname != "INFO"] == []


def test_faults_are_said(folder: Path, tmp_path: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot load"):
        fp4graph.load(str(folder), "all")
    shard.write_bytes(whole)
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.up_proj"):
        fp4graph.load(str(tmp_path / "nan"), "all")
    tiny("mixtral").save_pretrained(tmp_path / "experts")
    with pytest.raises(RefusalError, match="it keeps no experts"):
        fp4graph.load(str(tmp_path / "experts"), "expert", kernel="dequantized")
    with pytest.raises(OptionError, match="on_refusal"):
        FP4Config(on_refusal="no")  # type: ignore[arg-type]
    packed = tmp_path / "packed"
    fp4graph.load(str(folder), "attn").save_pretrained(packed)
    file = packed / "model.safetensors"
    state = load_file(file)
    del state["model.layers.0.self_attn.q_proj.qdata"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.qdata"):
        fp4graph.load(str(packed))


def test_the_command(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    arguments = ["convert", str(tiny_folder), "--select", '{"all": "nvfp4", "v": null}']
    result = CliRunner().invoke(main, [*arguments, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "12 of 15 linears in FP4" in result.stdout
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp4graph"
    assert config["select"] == {"all": "nvfp4", "v": None}
    assert (out / "tokenizer.json").is_file()
    model = fp4graph.load(str(out))
    assert len(fp4graph.report_of(model).selected) == 12
    shown = CliRunner().invoke(main, ["inspect", str(out)], catch_exceptions=False)
    assert "12 of 15 linears in FP4" in shown.stdout
    assert CliRunner().invoke(main, ["inspect", str(out), "--select", "q"]).exit_code == 2
    again = CliRunner().invoke(main, [*arguments, "--out", str(out)])
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["packed"], "no draft is left"


def test_what_measures_against_dense_weights_says_so(folder: Path, tmp_path: Path) -> None:
    fp4graph.load(str(folder), "attn").save_pretrained(tmp_path / "packed")
    for find in (fp4graph.models.load, fp4graph.models.outline):
        with pytest.raises(ModelError, match="its linears are packed: give the dense checkpoint"):
            find(str(tmp_path / "packed"))


def test_a_full_disk_leaves_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp4graph.loading import save

    model = fp4graph.load(str(tiny_folder), "all")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(ModelError, match="No space left"):
        save(model, tmp_path / "packed")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match=r"it takes about 0\.\d GB, and 0\.0 GB are free"):
        save(model, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []
