"""Writes the tiny checkpoints of tests/checkpoints/modelopt with ModelOpt's own package.

    pip install nvidia-modelopt==0.47.0 transformers accelerate requests
    python bench/modelopt/make.py tests/checkpoints/modelopt

It needs no GPU. `dense` is the model before, which the others are made of.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

WAYS = {
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "w4a16-nvfp4": mtq.W4A16_NVFP4_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8-per-channel": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
}
NEEDED = ("config.json", "hf_quant_config.json", "model.safetensors")


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64, max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def main() -> None:
    out = Path(sys.argv[1])
    model().save_pretrained(out / "dense")
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    for name, way in WAYS.items():
        quantised = mtq.quantize(model(), way, lambda each: [each(row[None]) for row in ids])
        export_hf_checkpoint(quantised, dtype=torch.bfloat16, export_dir=out / name)
    for path in out.glob("*/*"):
        if path.name not in NEEDED:
            path.unlink() if path.is_file() else shutil.rmtree(path)


if __name__ == "__main__":
    main()
