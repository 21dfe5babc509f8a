"""Checkpoints that are not the model's: nothing is drawn at random without a word."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from fp4graph import ModelError, models
from fp4graph.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Weights = dict[str, Tensor]


def changed(tiny_folder: Path, to: Path, change: Callable[[Weights], object]) -> str:
    """Copy a model's folder with other weights."""
    shutil.copytree(tiny_folder, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.pop("lm_head.weight"), "lacks lm_head.weight"),
        (
            lambda w: [w.pop(n) for n in list(w) if n.startswith("model.layers.1.")],
            r"lacks model\.layers\.1\.input_layernorm.* and 6 more",
        ),
        (
            lambda w: w.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(16)}),
            r"has no place in the model for model\.layers\.1\.self_attn\.q_norm\.weight",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(32)}),
            r"has another shape for model\.norm\.weight",
        ),
    ],
)
def test_weights_that_are_not_the_model_s_are_named(
    tiny_folder: Path, tmp_path: Path, change: Callable[[Weights], object], words: str
) -> None:
    folder = changed(tiny_folder, tmp_path / "m", change)
    with pytest.raises(ModelError, match=words) as caught:
        models.load(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert "--allow-weights" in str(caught.value)


def test_what_is_meant_can_be_allowed(tiny_folder: Path, tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        weights.pop("lm_head.weight")
        weights["mtp.0.weight"] = torch.ones(2)

    folder = changed(tiny_folder, tmp_path / "m", change)
    with pytest.raises(ModelError, match=r"mtp\.0\.weight"):
        models.load(folder, allow_weights=["lm_head.*"])
    before = torch.get_rng_state()
    first, second = (models.load(folder, allow_weights=["lm_head.*", "mtp.*"]) for _ in range(2))
    assert first.revision() == second.revision(), "what is drawn is the same each time"
    assert torch.equal(torch.get_rng_state(), before)
    command = ["ablate", folder, "--select", "v", "--tokens", "64", "--seq-len", "16"]
    command += ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "lm_head.weight" in result.output
    result = CliRunner().invoke(main, [*command, "--allow-weights", "lm_head.*,mtp.*"])
    assert result.exit_code == 0, result.output


def _gguf(path: Path, drop: str, **options: int) -> None:
    """Write a tiny Llama, without the tensors whose name holds `drop`."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(260)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*bytes_to_unicode().values(), "<s>", "</s>", "ab", "ba"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    shapes = {
        "token_embd": (260, 64), "output": (260, 64), "output_norm": (64,),
        "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,), "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64), "blk.0.ffn_down": (64, 96),
    }  # fmt: skip
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        if not drop or drop not in name:
            value = generator.standard_normal(shape).astype(np.float32)
            writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_that_lacks_weights_is_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FP4GRAPH_CACHE", str(tmp_path / "cache"))
    _gguf(tmp_path / "whole.gguf", "")
    assert models.load(str(tmp_path / "whole.gguf")).model.config.num_hidden_layers == 1
    kept = list((tmp_path / "cache" / "gguf").iterdir())
    _gguf(tmp_path / "less.gguf", "ffn_up")
    for _ in range(2):  # nothing that was kept the first time serves the second
        with pytest.raises(ModelError, match=r"lacks .*up_proj"):
            models.load(str(tmp_path / "less.gguf"))
    loaded = models.load(str(tmp_path / "less.gguf"), allow_weights=["*up_proj*"])
    assert not loaded.is_random
    assert list((tmp_path / "cache" / "gguf").iterdir()) == kept


def test_a_part_of_a_gguf_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP4GRAPH_CACHE", str(tmp_path / "cache"))
    _gguf(tmp_path / "m.gguf", "", split_max_tensors=4)
    first = next(tmp_path.glob("m-00001-of-*.gguf"))
    with pytest.raises(ModelError, match=r"one of \d parts of a model; put them together"):
        models.load(str(first))


@pytest.mark.filterwarnings("ignore")  # of torchao
def test_weights_that_are_quantised_already_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    options = {"quantization_config": config, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, **options)
    model.save_pretrained(tmp_path / "ao")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny_folder) / name, tmp_path / "ao" / name)
    with pytest.raises(ModelError, match=r"quantised already \(model\.layers.* is a Int8"):
        models.load(str(tmp_path / "ao"))
