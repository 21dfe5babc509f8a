"""Exported checkpoints: read by their own libraries, by transformers, and here again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from support.calibration import BATCHES
from support.closer import relative_l2
from support.models import tiny, tokens

import fp4graph
from fp4graph import ModelError, Policy, RefusalError, Scheme, SelectorError, WeightError
from fp4graph.checkpoints.export import export
from fp4graph.checkpoints.shards import Shards
from fp4graph.cli import main
from fp4graph.skeleton import skeleton

if TYPE_CHECKING:
    from pathlib import Path

IDS = tokens(16)
MIX = {"all": "nvfp4", "mlp": "mxfp4", "attn,blocks=1": None}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits.float()


def dense(family: str, folder: Path) -> Path:
    tiny(family).save_pretrained(folder, max_shard_size="150KB")
    return folder


def write(folder: Path, select: Any, to: str, out: Path, **options: Any) -> Any:
    policy = Policy.of(select, Scheme.of(**options.pop("scheme", {})))
    return export(folder, skeleton(folder, torch.bfloat16), policy, to, out, **options)


def parts(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    shards, found = Shards(folder), {}
    for name in shards.files:
        path, _, last = name.rpartition(".")
        found.setdefault(path, {})[last] = shards.get(name)
    return {path: each for path, each in found.items() if "weight_scale" in each}


@pytest.mark.parametrize(
    "family, select",
    [
        ("llama", "all"),
        ("qwen3", MIX),
        ("llama", {"attn": "mxfp4"}),
        ("mixtral", "attn,expert"),
        ("llama", {"attn": "fp8"}),
        ("qwen3", {"all": "nvfp4", "o,down": "fp8"}),
    ],
)
def test_compressed_tensors_reads_the_same_values(family: str, select: Any, tmp_path: Path) -> None:
    folder = dense(family, tmp_path / "dense")
    done = write(folder, select, "compressed-tensors", tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups
    found = parts(tmp_path / "ct")
    assert len(found) == len(done.report.selected) + (family == "mixtral") * (2 * 12 - 4)
    own = fp4graph.load(str(tmp_path / "ct"), dtype=torch.float32)
    for path, each in found.items():
        scheme = next(s for s in groups.values() if targets(path, s.targets))
        assert not any(targets(path, [name]) for name in config["ignore"])
        assert sum(targets(path, s.targets) for s in groups.values()) == 1
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        theirs = compressor.decompress(dict(each), scheme)["weight"]
        if family == "mixtral" and "experts" in path:
            continue
        ours = own.get_submodule(path).packed.dequantize(theirs.dtype)
        if scheme.format.startswith("mxfp4"):
            assert torch.equal(ours, theirs)
        else:  # a divisor there, its reciprocal here
            assert torch.allclose(ours.float(), theirs.float(), rtol=2**-8)
            assert (ours == theirs).float().mean() > 0.999


def targets(path: str, names: list[str]) -> bool:
    import re

    return any(
        re.match(name.removeprefix("re:"), path) if name.startswith("re:") else name == path
        for name in names
    )


@pytest.mark.parametrize("family, select", [("llama", "all"), ("qwen3", MIX)])
def test_transformers_gives_our_logits(family: str, select: Any, tmp_path: Path) -> None:
    folder = dense(family, tmp_path / "dense")
    write(folder, select, "compressed-tensors", tmp_path / "ct")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ct", dtype=torch.bfloat16
    )
    ours = fp4graph.load(str(tmp_path / "ct"), dtype=torch.bfloat16)
    far = fp4graph.load(str(folder), "all", dtype=torch.bfloat16, format="mxfp4")
    want = logits(theirs)
    assert float((logits(ours) - want).norm() / want.norm()) < 0.02
    assert float((logits(far) - want).norm() / want.norm()) > 0.05


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
def test_both_layouts_hold_the_same(family: str, tmp_path: Path) -> None:
    folder = dense(family, tmp_path / "dense")
    select = "all,expert" if family == "mixtral" else "all"
    for to in ("compressed-tensors", "modelopt"):
        write(folder, select, to, tmp_path / to)
    ct, mo = parts(tmp_path / "compressed-tensors"), parts(tmp_path / "modelopt")
    assert ct.keys() == mo.keys()
    for path, each in ct.items():
        assert torch.equal(each["weight_packed"], mo[path]["weight"])
        assert torch.equal(
            each["weight_scale"].view(torch.uint8), mo[path]["weight_scale"].view(torch.uint8)
        )
        assert each["weight_global_scale"].shape == (1,)
        assert mo[path]["weight_scale_2"].shape == ()
        assert each["weight_global_scale"] == mo[path]["weight_scale_2"].reciprocal()
    one, other = (fp4graph.load(str(tmp_path / to)) for to in ("compressed-tensors", "modelopt"))
    assert torch.allclose(logits(one), logits(other), atol=1e-4)
    assert {row.path for row in fp4graph.report_of(one).selected} == {
        row.path for row in fp4graph.report_of(other).selected
    }
    quant = json.loads((tmp_path / "modelopt" / "hf_quant_config.json").read_text())
    assert quant["quantization"].keys() >= {
        "quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules"
    }  # fmt: skip


@pytest.mark.parametrize("to", ["compressed-tensors", "modelopt"])
def test_fused_sets_share_one_scale_that_is_computed_anew(to: str, tmp_path: Path) -> None:
    folder = dense("llama", tmp_path / "dense")
    write(folder, "all", to, tmp_path / "out")
    found, shards = parts(tmp_path / "out"), Shards(folder)
    top = "weight_global_scale" if to == "compressed-tensors" else "weight_scale_2"
    for names in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        paths = [f"model.layers.1.{name}" for name in names]
        assert len({float(found[path][top]) for path in paths}) == 1
        whole = fp4graph.quantize(torch.cat([shards.get(f"{path}.weight") for path in paths]))
        codes = torch.cat(
            [found[path].get("weight_packed", found[path].get("weight")) for path in paths]
        )
        assert torch.equal(codes, whole.qdata)


def test_w4a4_has_the_inputs_scale(tmp_path: Path) -> None:
    folder = dense("llama", tmp_path / "dense")
    scheme = {"activations": "same"}
    with pytest.raises(RefusalError, match="W4A4 needs the range of its inputs"):
        write(folder, "all", "modelopt", tmp_path / "out", scheme=scheme)
    paths = [name.removesuffix(".weight") for name in Shards(folder).files if "proj" in name]
    ranges = dict.fromkeys(paths, 13.44)
    for to, name, want in (
        ("modelopt", "input_scale", 0.005),
        ("compressed-tensors", "input_global_scale", 200.0),
    ):
        write(folder, "all", to, tmp_path / to, scheme=scheme, inputs=ranges)
        assert all(
            float(each[name]) == pytest.approx(want) for each in parts(tmp_path / to).values()
        )
        model = fp4graph.load(str(tmp_path / to))
        assert "W4A4" in fp4graph.report_of(model).selected[0].reason
    mixed = {"attn": "nvfp4", "mlp": {"activations": "same"}}
    write(folder, mixed, "modelopt", tmp_path / "mixed", inputs=ranges)
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert {each["quant_algo"] for each in config["quantized_layers"].values()} == {
        "NVFP4", "W4A16_NVFP4"
    }  # fmt: skip


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    folder = dense("llama", tmp_path / "dense")
    out = tmp_path / "out"
    for select, to, options, problem in (
        ("q", "compressed-tensors", {}, "cuts 2 sets"),
        ("all", "modelopt", {"scheme": {"format": "mxfp4"}}, "no mxfp4 W4A16 that engines load"),
        ("all", "modelopt", {"scheme": {"quantizer": "rtn@16"}}, "changes its inputs"),
        ("all", "modelopt", {"scheme": {"activations": "int8"}}, "fp4graph's own"),
        ("all", "compressed-tensors", {"scheme": {"format": "mxfp4-fitted"}}, "no engine reads"),
    ):
        with pytest.raises(RefusalError, match=problem):
            write(folder, select, to, out, **options)
    with pytest.raises(RefusalError, match="cannot be written in this layout; select others"):
        write(folder, "all", "modelopt", out, scheme={"activations": "int8"})
    with pytest.raises(SelectorError, match="leaves no linear"):
        write(folder, "q", "modelopt", out, round="down")
    with pytest.raises(RefusalError, match=r"stored \[in, out\]"):
        write(dense("gpt2", tmp_path / "gpt2"), "all", "modelopt", out)
    with pytest.raises(RefusalError, match="a part of a fused weight"):
        write(dense("phi3", tmp_path / "phi3"), "up", "modelopt", out)
    broken = tiny("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "nan")
    with pytest.raises(WeightError, match=r"layers\.1\.mlp"):
        write(tmp_path / "nan", "all", "modelopt", out)
    out.mkdir()
    with pytest.raises(ModelError, match="is there already"):
        write(folder, "all", "modelopt", out)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"dense", "gpt2", "phi3", "nan", "out"}, "nothing half-written"


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_a_converted_folder_is_written_code_for_code(format: str, tmp_path: Path) -> None:
    folder = dense("llama", tmp_path / "dense")
    fp4graph.load(str(folder), "down,o", format=format).save_pretrained(tmp_path / "packed")
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["export", str(tmp_path / "packed"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    one, other = (fp4graph.load(str(each)) for each in (tmp_path / "packed", out))
    assert torch.allclose(logits(one), logits(other), atol=1e-5)
    for path, each in parts(out).items():
        packed = one.get_submodule(path).packed
        assert torch.equal(each["weight_packed"], packed.qdata)
    fp4graph.load(str(folder), "all", format=format).save_pretrained(tmp_path / "whole")
    done = CliRunner().invoke(main, ["export", str(tmp_path / "whole"), "--out", str(out / "2")])
    assert done.exit_code == 0, done.output
    found = parts(out / "2")
    tops = {
        float(found[f"model.layers.0.mlp.{n}_proj"].get("weight_global_scale", 0))
        for n in ("gate", "up")
    }
    assert len(tops) == 1
    done = CliRunner().invoke(
        main, ["export", str(tmp_path / "whole"), "--select", "q", "--out", str(out / "3")]
    )
    assert "is packed already" in done.stderr


def test_codes_of_fused_sets_stay_under_scales_that_are_rounded_anew(tmp_path: Path) -> None:
    folder = dense("llama", tmp_path / "dense")
    model = fp4graph.models.load(str(folder), torch.float32).model
    codes = fp4graph.calibrate(model, BATCHES, "all", quantizer="gptq:weighted-scale-search")
    policy = Policy.of("all", Scheme.of(calibration=codes))
    export(folder, skeleton(folder, torch.bfloat16), policy, "modelopt", tmp_path / "out")
    found, written = parts(tmp_path / "out"), fp4graph.load(str(tmp_path / "out"))
    tops = {path: float(each["weight_scale_2"]) for path, each in found.items()}
    assert len(set(tops.values())) < len({float(p.per_tensor_scale) for p in codes.packed.values()})
    for path, known in codes.packed.items():
        packed = written.get_submodule(path).packed
        assert torch.equal(packed.qdata, known.qdata)
        ours, theirs = packed.dequantize(), known.dequantize()
        assert torch.allclose(ours, theirs, rtol=2**-4, atol=float(theirs.abs().max()) / 1000)


def test_codes_for_an_engine_are_written_to_the_bit(tmp_path: Path) -> None:
    folder = dense("llama", tmp_path / "dense")
    model = fp4graph.models.load(str(folder), torch.float32).model
    how = {"quantizer": "gptq:weighted-scale-search"}
    codes = fp4graph.calibrate(model, BATCHES, "all", serve="vllm", **how)
    tops = {path.split(".", 3)[3]: each.per_tensor_scale for path, each in codes.packed.items()}
    sets = [tops[f"self_attn.{each}_proj"] for each in "qkv"]
    assert sets[0] == sets[1] == sets[2]
    assert tops["mlp.gate_proj"] == tops["mlp.up_proj"]
    assert len({float(each) for each in tops.values()}) == 4, "q k v, o, gate up, down"
    policy = Policy.of("all", Scheme.of(calibration=codes))
    export(folder, skeleton(folder, torch.bfloat16), policy, "modelopt", tmp_path / "out")
    written = fp4graph.load(str(tmp_path / "out"))
    for path, known in codes.packed.items():
        assert torch.equal(written.get_submodule(path).packed.dequantize(), known.dequantize())
    with pytest.raises(fp4graph.OptionError, match="serve='tgi': expected vllm, sglang"):
        fp4graph.calibrate(model, BATCHES, "all", serve="tgi", **how)


@pytest.mark.parametrize("quantizer", ["rtn+smooth", "distilled"])
def test_norms_are_divided_in_place_of_inputs(quantizer: str, tmp_path: Path) -> None:
    folder = dense("llama", tmp_path / "dense")
    model = fp4graph.models.load(str(folder), torch.float32).model
    codes = fp4graph.calibrate(model, BATCHES, "all", format="mxfp4", quantizer=quantizer)
    policy = Policy.of("all", Scheme.of("mxfp4", calibration=codes))
    empty = skeleton(folder, torch.float32)
    export(folder, empty, policy, "compressed-tensors", tmp_path / "out")
    written = fp4graph.load(str(tmp_path / "out"))
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = f"model.layers.1.{name}.weight"
        linear = "q_proj" if name == "input_layernorm" else "up_proj"
        smooth = next(s for fqn, s in codes.smooth.items() if ".1." in fqn and linear in fqn)
        assert torch.equal(written.state_dict()[norm], model.state_dict()[norm] / smooth)
        assert quantizer == "distilled" or not torch.equal(smooth, torch.ones_like(smooth))
    backend = fp4graph.backend(format="mxfp4", calibration=codes, inner="eager")
    ours = logits(torch.compile(model, backend=backend))
    assert relative_l2(logits(written), ours) < 1e-5
    del codes.smooth["model.layers.1.self_attn.v_proj"]
    with pytest.raises(RefusalError, match="v_proj takes the same norm's result"):
        export(folder, empty, policy, "compressed-tensors", tmp_path / "cut")


def test_norms_that_cannot_be_divided_are_said(tmp_path: Path) -> None:
    folder = dense("gemma3", tmp_path / "dense")  # its norms multiply by 1 + w
    model = fp4graph.models.load(str(folder), torch.float32).model
    codes = fp4graph.calibrate(model, BATCHES, "all", format="mxfp4", quantizer="rtn+smooth")
    policy = Policy.of("all", Scheme.of("mxfp4", calibration=codes))
    with pytest.raises(RefusalError, match="no norm's weight could be divided in its place"):
        export(folder, skeleton(folder, torch.float32), policy, "modelopt", tmp_path / "out")


@pytest.mark.slow
def test_calibrated_codes_are_written(tmp_path: Path) -> None:
    folder = dense("llama", tmp_path / "dense")
    model = fp4graph.models.load(str(folder), torch.float32).model
    codes = fp4graph.calibrate(model, BATCHES, "down,o", quantizer="gptq")
    policy = Policy.of("down,o", Scheme.of(calibration=codes))
    export(folder, skeleton(folder, torch.bfloat16), policy, "modelopt", tmp_path / "out")
    for path, each in parts(tmp_path / "out").items():
        assert torch.equal(each["weight"], codes.packed[path].qdata)


@pytest.mark.slow
def test_the_command(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "export",
        str(tiny_folder),
        "--select",
        "q | mlp",
        "--round",
        "up",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "rounded to whole fused sets" in done.stdout
    card = (out / "README.md").read_text()
    assert f"fp4graph export {tiny_folder} --select '{{" in card, "as rounded"
    assert (out / "tokenizer.json").is_file()
    done = CliRunner().invoke(
        main,
        ["ablate", str(out), "--dense", str(tiny_folder), "--tokens", "64", "--seq-len", "16",
         "--out", str(tmp_path / "results"), "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    own = json.loads(done.stdout.splitlines()[1])
    seen = CliRunner().invoke(main, ["inspect", str(out), "--json"])
    assert seen.exit_code == 0, seen.output
    rows = [json.loads(line) for line in seen.stdout.splitlines()]
    assert sum(row["selected"] for row in rows) == 12
    seen = CliRunner().invoke(main, ["inspect", str(out), "--select", "q"])
    assert "packed already" in seen.stderr
    assert own["kl"] > 0
    assert own["linears"] == 12
    done = CliRunner().invoke(
        main,
        ["export", str(tiny_folder), "--activations", "same", "--out", str(tmp_path / "w4a4")],
    )
    assert done.exit_code == 0, done.output
    assert all("input_global_scale" in each for each in parts(tmp_path / "w4a4").values())
