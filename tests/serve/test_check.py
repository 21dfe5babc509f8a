"""Engines' rules on checkpoints as they should be, and on those that are known to break."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.models import tiny

from fp4graph import OptionError, Policy, Scheme
from fp4graph.checkpoints.export import export
from fp4graph.cli import main
from fp4graph.serve.check import Row, check
from fp4graph.serve.rules import MXFP4_ON_VLLM
from fp4graph.skeleton import skeleton

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Config = dict[str, Any]

MIX = {"all": "nvfp4", "mlp": "mxfp4", "attn,blocks=1": None}
ATTN = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"


def written(
    folder: Path, select: Any = "all", to: str = "compressed-tensors", family: str = "llama"
) -> Path:
    dense, out = folder / "dense", folder / "out"
    tiny(family).save_pretrained(dense)
    policy = Policy.of(select, Scheme.of())
    export(dense, skeleton(dense, torch.bfloat16), policy, to, out)
    return out


def changed(folder: Path, change: Callable[[Config], None]) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    return folder


def stored(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: each.contiguous() for name, each in tensors.items()}, path)
    return folder


def ask(folder: Path, engine: str = "vllm") -> dict[str, tuple[str, str]]:
    rows, (verdict,) = check(folder, [engine])
    answers = {row.linear: row.engines[engine] for row in rows}
    assert verdict.loads == (not any(each.is_error for each in answers.values()))
    return {name: (each.runs, each.why) for name, each in answers.items()}


@pytest.mark.parametrize("to", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize(
    "family, select",
    [
        ("llama", "all"),
        ("llama", "mlp | attn,blocks=0"),
        ("mixtral", "attn,expert"),
        ("qwen3", "down | lm_head"),
    ],
)
def test_what_is_exported_is_served_as_written(
    to: str, family: str, select: str, tmp_path: Path
) -> None:
    folder = written(tmp_path, select, to, family)
    for engine in ("vllm", "sglang"):
        rows, (verdict,) = check(folder, [engine])
        assert verdict.loads, verdict.why
        for row in rows:
            expected = "nvfp4 W4A16" if row.on_disk == "nvfp4" else "dense"
            assert row.engines[engine].runs == expected
    assert any(row.on_disk == "nvfp4" for row in rows)
    assert any(row.on_disk == "dense" for row in rows)


def test_mxfp4_is_w4a4_on_some_gpus_and_not_for_sglang(tmp_path: Path) -> None:
    folder = written(tmp_path, MIX)
    found = ask(folder)
    assert found[f"{MLP}.up_proj"] == (MXFP4_ON_VLLM, "whatever the file says of activations")
    assert found[f"{ATTN}.q_proj"] == ("nvfp4 W4A16", "")
    assert found["model.layers.1.self_attn.q_proj"] == ("dense", "")
    runs, why = ask(folder, "sglang")[f"{MLP}.up_proj"]
    assert (runs, "no scheme for linears in MXFP4" in why) == ("ERROR", True)
    assert ask(folder, "compressed-tensors")[f"{MLP}.up_proj"][0] == "mxfp4 W4A16"
    assert "one config group" in ask(folder, "llama.cpp")[f"{MLP}.up_proj"][1]


def test_a_partly_ignored_set_is_refused(tmp_path: Path) -> None:
    folder = changed(written(tmp_path), lambda config: config["ignore"].append(f"{ATTN}.k_proj"))
    for engine in ("vllm", "sglang"):
        runs, why = ask(folder, engine)[f"{ATTN}.q_proj"]
        assert runs == "ERROR"
        assert "different schemes" in why
    found = ask(folder, "compressed-tensors")
    assert found[f"{ATTN}.k_proj"] == ("ERROR", "taken as dense, and the file has it in nvfp4")
    assert found[f"{ATTN}.q_proj"] == ("nvfp4 W4A16", "")


def test_a_partly_listed_set_is_loaded_as_dense(tmp_path: Path) -> None:
    def drop(config: Config) -> None:
        config["config_groups"]["group_0"]["targets"].remove(f"{MLP}.up_proj")

    folder = changed(written(tmp_path), drop)
    assert "taken as dense" in ask(folder)[f"{MLP}.gate_proj"][1]
    assert "no target" in ask(folder, "sglang")[f"{MLP}.gate_proj"][1]
    modelopt = written(tmp_path / "mo", {"attn": "nvfp4", "mlp": "nvfp4"}, "modelopt")

    def one_of_two(config: Config) -> None:
        config["quant_algo"] = "MIXED_PRECISION"
        config["quantized_layers"] = {f"{MLP}.gate_proj": {"quant_algo": "NVFP4"}}

    assert "scale of its inputs" in ask(changed(modelopt, one_of_two))[f"{MLP}.up_proj"][1]


def test_two_schemes_in_one_set(tmp_path: Path) -> None:
    def split(config: Config) -> None:
        first = config["config_groups"]["group_0"]
        first["targets"].remove(f"{ATTN}.v_proj")
        other = json.loads(json.dumps(first)) | {"targets": [f"{ATTN}.v_proj"]}
        other["input_activations"] = other["weights"] | {"dynamic": "local"}
        config["config_groups"]["group_1"] = other

    found = ask(changed(written(tmp_path), split))
    assert found[f"{ATTN}.v_proj"] == ("nvfp4 W4A16", ""), "the first shard's counts for all"
    modelopt = written(tmp_path / "mo", "all", "modelopt")

    def mixed(config: Config) -> None:
        config["quant_algo"] = "MIXED_PRECISION"
        config["quantized_layers"] = {
            f"{ATTN}.q_proj": {"quant_algo": "NVFP4"}, f"{ATTN}.k_proj": {"quant_algo": "FP8"}
        }  # fmt: skip

    assert "listed as FP8 and NVFP4" in ask(changed(modelopt, mixed))[f"{ATTN}.v_proj"][1]


def test_scales_that_differ_in_a_set_or_are_upside_down(tmp_path: Path) -> None:
    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MLP}.up_proj.weight_global_scale"] *= 2

    found = ask(stored(written(tmp_path / "a"), double))
    assert "several per-tensor scales" in found[f"{MLP}.gate_proj"][1]
    assert found[f"{MLP}.down_proj"] == ("nvfp4 W4A16", "")

    def invert(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_global_scale")]:
            tensors[name] = tensors[name].reciprocal()

    found = ask(stored(written(tmp_path / "b"), invert))
    assert all("upside down" in why for runs, why in found.values() if runs != "dense")


def test_a_target_by_class_is_met_in_another_order(tmp_path: Path) -> None:
    def overlap(config: Config) -> None:
        group = config["config_groups"]["group_0"]
        eight = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
        config["config_groups"] = {
            "group_0": {"targets": ["Linear"], "weights": eight, "format": "float-quantized"},
            "group_1": group,
        }
        config["ignore"] = ["lm_head"]

    folder = changed(written(tmp_path), overlap)
    assert all(why == "" for _, why in ask(folder, "compressed-tensors").values())
    assert "taken as fp8" in ask(folder, "sglang")[f"{ATTN}.q_proj"][1], "class before its parts"
    assert ask(folder)[f"{ATTN}.q_proj"] == ("nvfp4 W4A16", ""), "parts before class"


def test_a_substring_of_an_excluded_name_makes_a_layer_dense(tmp_path: Path) -> None:
    folder = written(tmp_path, "all", "modelopt")

    def exclude(config: Config) -> None:
        config["exclude_modules"].append(f"{MLP}.gate")  # a router's name, in other models

    found = ask(changed(folder, exclude))
    assert found[f"{MLP}.gate_proj"] == ("ERROR", "taken as dense, and the file has it in nvfp4")
    assert ask(folder, "sglang")[f"{MLP}.gate_proj"] == ("nvfp4 W4A16", "")


def test_mixed_experts_and_missing_inputs(tmp_path: Path) -> None:
    folder = written(tmp_path, "expert", family="mixtral")

    def drop(config: Config) -> None:
        targets = config["config_groups"]["group_0"]["targets"]
        config["ignore"].append(next(each for each in targets if each.endswith("w2$")))

    changed(folder, drop)
    found = ask(folder)
    name = "model.layers.0.block_sparse_moe.experts.1.w1"
    assert "need the same scheme" in found[name][1]
    assert "at random" in ask(folder, "transformers")[name][1]
    other = written(tmp_path / "other")

    def w4a4(config: Config) -> None:
        group = config["config_groups"]["group_0"]
        group["input_activations"] = group["weights"] | {"dynamic": "local"}

    assert "scale of its inputs is missing" in ask(changed(other, w4a4))[f"{ATTN}.o_proj"][1]


def test_the_command(tmp_path: Path) -> None:
    folder = written(tmp_path)
    done = CliRunner().invoke(
        main, ["check-serve", str(folder), "--engine", "vllm,sglang", "--json"]
    )
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"linear", "on_disk", "engines"} == lines[0].keys()
    assert lines[-1] == {"engine": "sglang", "rules": "0.5.23", "loads": True, "why": ""}
    changed(folder, lambda config: config["ignore"].append(f"{ATTN}.k_proj"))
    done = CliRunner().invoke(main, ["check-serve", str(folder)])
    assert done.exit_code == 1
    assert "vllm (0.33.0): does not" in done.stdout
    assert "ERROR" in done.stdout
    with pytest.raises(OptionError, match="expected vllm, sglang"):
        check(folder, ["ollama"])
    dense = CliRunner().invoke(main, ["check-serve", str(tmp_path / "dense"), "--engine", "vllm"])
    assert dense.exit_code == 0, dense.output
    assert isinstance(check(tmp_path / "dense", ["vllm"])[0][0], Row)
