"""Checkpoints that other programs wrote run packed here, code for code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from safetensors.torch import save_file
from support.experts import gpt_oss
from support.models import tiny, tokens

import fp4graph
from fp4graph import ModelError, OptionError
from fp4graph.formats import MXFP4

if TYPE_CHECKING:
    from pathlib import Path

IDS = tokens(16) % 96


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits.float()


def compressed(folder: Path, presets: dict[str, str], **config: Any) -> dict[str, torch.Tensor]:
    """Write a Llama as compressed-tensors' own compressor packs it: preset by regex."""
    model = tiny("llama")
    tensors, groups = dict(model.state_dict()), {}
    for number, (pattern, preset) in enumerate(presets.items()):
        scheme = preset_name_to_scheme(preset, [pattern])
        format = {"N": "nvfp4-pack-quantized", "M": "mxfp4-pack-quantized"}.get(
            preset[0], "float-quantized"
        )
        groups[f"group_{number}"] = scheme.model_copy(update={"format": format})
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            if pattern.removeprefix("re:").strip(".*") not in name:
                continue
            w = tensors.pop(name).detach()
            path = name.removesuffix(".weight")
            tensors |= {f"{path}.{k}": v for k, v in packed(w, format, scheme).items()}
    made = QuantizationConfig(
        config_groups=groups, format="mixed-precision", quantization_status="compressed",
        ignore=["lm_head"],
    )  # fmt: skip
    model.config.save_pretrained(folder)
    whole = json.loads((folder / "config.json").read_text())
    whole["architectures"] = ["LlamaForCausalLM"]
    whole["quantization_config"] = made.model_dump(mode="json") | config
    (folder / "config.json").write_text(json.dumps(whole))
    kept = {name: each.contiguous() for name, each in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return kept


def packed(w: torch.Tensor, format: str, scheme: Any) -> dict[str, torch.Tensor]:
    if format == "float-quantized":
        scale = (w.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
        return {"weight": (w / scale.float()).to(torch.float8_e4m3fn), "weight_scale": scale}
    size = scheme.weights.group_size
    amax = w.unflatten(1, (-1, size)).abs().amax(-1)
    given = {"weight": w, "weight_scale": amax / 6}
    if format.startswith("nvfp4"):
        top = 2688 / w.abs().max().reshape(1)
        given = {"weight": w, "weight_scale": (amax / 6 * top).to(torch.float8_e4m3fn).float()}
        given["weight_global_scale"] = top
    else:
        given["weight_scale"] = 2.0 ** (amax.log2().floor() - 2)
    compressor = BaseCompressor.get_value_from_registry(format)
    found = compressor.compress(given, scheme)
    if scheme.input_activations is not None and format.startswith("nvfp4"):
        found["input_global_scale"] = torch.full((1,), 200.0)
    return {name: each.detach() for name, each in found.items()}


@pytest.mark.parametrize(
    "presets",
    [
        {"re:.*proj": "NVFP4A16"},
        {"re:.*mlp.*": "MXFP4A16", "re:.*self_attn.*": "NVFP4"},
        {"re:.*mlp.*": "NVFP4A16", "re:.*self_attn.*": "FP8_DYNAMIC"},
        {"re:.*mlp.*": "MXFP4", "re:.*self_attn.*": "NVFP4A16"},
    ],
    ids=str,
)
def test_what_compressed_tensors_packs(presets: dict[str, str], tmp_path: Path) -> None:
    tensors = compressed(tmp_path, presets)
    model = fp4graph.load(str(tmp_path), dtype=torch.float32)
    rows = {row.path: row for row in fp4graph.report_of(model).selected}
    codes = [name for name in tensors if name.endswith(".weight_packed")]
    fp8 = [name for name in tensors if tensors[name].dtype == torch.float8_e4m3fn]
    fp8 = [name.removesuffix(".weight") for name in fp8 if name.endswith(".weight")]
    assert {*fp8, *(name.removesuffix(".weight_packed") for name in codes)} == set(rows)
    for name in codes:
        path = name.removesuffix(".weight_packed")
        found = model.get_submodule(path).packed
        assert torch.equal(found.qdata, tensors[name])
        scale = tensors[f"{path}.weight_scale"]
        assert torch.equal(found.scale.view(torch.uint8), scale.view(torch.uint8))
        if found.per_tensor_scale is not None:
            assert found.per_tensor_scale == tensors[f"{path}.weight_global_scale"].reciprocal()
        preset = next(v for k, v in presets.items() if k.removeprefix("re:").strip(".*") in path)
        rounds = not preset.endswith("A16")
        assert ("W4A4" in rows[path].reason) == rounds
    for path in fp8:
        want = tensors[f"{path}.weight"].float() * tensors[f"{path}.weight_scale"].float()
        assert torch.equal(model.get_submodule(path).packed.dequantize(), want)
        assert "W8A8" in rows[path].reason
    if set(presets.values()) == {"NVFP4A16"}:  # else activations are rounded there, in its own way
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        want = logits(theirs)
        assert float((logits(model) - want).norm() / want.norm()) < 0.02


def oss(folder: Path) -> dict[str, torch.Tensor]:
    """Write a gpt-oss as its authors pack it."""
    model = gpt_oss(96)
    tensors = dict(model.state_dict())
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        w_EKN = tensors.pop(name)
        each = [fp4graph.quantize(w.T.contiguous(), "mxfp4") for w in w_EKN]
        blocks = torch.stack([p.qdata.unflatten(1, (-1, 16)) for p in each])
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.stack([p.scale.view(torch.uint8) for p in each])
    model.config.save_pretrained(folder)
    whole = json.loads((folder / "config.json").read_text())
    whole["architectures"] = ["GptOssForCausalLM"]
    whole["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(whole))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return tensors


def test_gpt_oss_runs_packed(tmp_path: Path) -> None:
    tensors = oss(tmp_path)
    model = fp4graph.load(str(tmp_path), dtype=torch.float32)
    selected = fp4graph.report_of(model).selected
    assert {row.path.rpartition(".")[2] for row in selected} == {"gate_up_proj", "down_proj"}
    dense = gpt_oss(96)
    with torch.no_grad():
        for name, w_EKN in dense.named_parameters():
            if not name.endswith(("gate_up_proj", "down_proj")):
                continue
            for expert, w in enumerate(w_EKN):
                stacked = tensors[f"{name}_blocks"][expert].flatten(1)
                scale = tensors[f"{name}_scales"][expert].view(MXFP4.scale_codec.dtype)
                kind = type(fp4graph.quantize(w))
                one = kind(stacked, scale, None, (w.shape[1], w.shape[0]), MXFP4)
                w.copy_(one.dequantize(torch.float32).T)
    assert torch.allclose(logits(model), logits(dense), atol=1e-4)


def test_faults_are_named(tmp_path: Path) -> None:
    def broken(change: Any) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        tensors = compressed(folder, {"re:.*proj": "NVFP4A16"})
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError) as raised:
            fp4graph.load(str(folder))
        return str(raised.value)

    path = "model.layers.1.mlp.up_proj"
    cases = {
        f"{path}.weight_global_scale is missing": lambda t: t.pop(f"{path}.weight_global_scale"),
        f"{path} has scales, and no codes": lambda t: t.pop(f"{path}.weight_packed"),
        f"{path}.weight_scale is \\[": lambda t: t.update(
            {f"{path}.weight_scale": t[f"{path}.weight_scale"][:, :1].contiguous()}
        ),
        f"{path}.weight_global_scale is 0": lambda t: t[f"{path}.weight_global_scale"].zero_(),
        f"{path} is torch.int8": lambda t: t.update(
            {f"{path}.weight_packed": t[f"{path}.weight_packed"].view(torch.int8)}
        ),
        "other.thing is packed, and is no linear": lambda t: t.update(
            {name.replace(path, "other.thing"): t[name].clone() for name in list(t) if path in name}
        ),
        "lacks model.norm.weight": lambda t: t.pop("model.norm.weight"),
    }
    for expected, change in cases.items():
        assert expected.replace("\\", "") in broken(change)
    with pytest.raises(OptionError, match="packed already"):
        fp4graph.load(str(tmp_path / "0"), "attn")
