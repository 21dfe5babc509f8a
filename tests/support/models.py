"""Tiny random models, one of each family that roles.py knows."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import fp4graph

if TYPE_CHECKING:
    from fp4graph import Report

VOCAB = 96
BLOCKS = 2
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
_GQA = {**_SMALL, "num_key_value_heads": 2}
_GEMMA = {**_GQA, "head_dim": 16}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MOE = {
    **_GQA,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**_GQA, **_IDS),
    "mistral": lambda: hf.MistralConfig(**_GQA, **_IDS),
    "qwen2": lambda: hf.Qwen2Config(**_GQA, **_IDS),
    "qwen3": lambda: hf.Qwen3Config(**_GQA, **_IDS, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(**_GEMMA, **_IDS),
    "gemma3": lambda: hf.Gemma3TextConfig(**_GEMMA, **_IDS),
    "phi3": lambda: hf.Phi3Config(**_GQA, **_IDS),
    "gpt2": lambda: hf.GPT2Config(
        n_embd=64, n_layer=BLOCKS, n_head=4, vocab_size=VOCAB, n_positions=128, **_IDS
    ),
    "opt": lambda: hf.OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=BLOCKS, num_attention_heads=4,
        vocab_size=VOCAB, max_position_embeddings=128, word_embed_proj_dim=64, **_IDS,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SMALL, **_IDS),
    "falcon": lambda: hf.FalconConfig(
        hidden_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4, vocab_size=VOCAB, **_IDS
    ),
    "mixtral": lambda: hf.MixtralConfig(**_GQA, **_IDS, num_local_experts=4),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **_MOE, **_IDS, shared_expert_intermediate_size=64, decoder_sparse_step=1
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**_MOE, **_IDS, head_dim=16),
}  # fmt: skip

# the block linears of one block, which `all` picks
BLOCK_LINEARS = {
    "phi3": ["qkv", "o", "gate_up", "down"],
    "gpt2": ["qkv", "o", "up", "down"],
    "opt": ["q", "k", "v", "o", "up", "down"],
    "gpt_neox": ["qkv", "o", "up", "down"],
    "falcon": ["qkv", "o", "up", "down"],
    "mixtral": ["q", "k", "v", "o"],
    "qwen3_moe": ["q", "k", "v", "o"],
}
QUICK = ("llama", "gpt2")  # the others are slow tests
FAMILIES = [
    pytest.param(family, marks=() if family in QUICK else pytest.mark.slow) for family in CONFIGS
]
WITH_BIAS = ["qwen2", "gpt2", "opt", "gpt_neox"]
DENSE = ["q", "k", "v", "o", "gate", "up", "down"]


def tiny(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, vocab: int = VOCAB
) -> torch.nn.Module:
    """Build a random model; weights have the spread of trained ones, so FP4 changes results."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.vocab_size = vocab
    model = hf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.normal_(std=0.08)
    return model


def tokens(length: int = 8, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Draw token ids, int64 [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def dequantised(model: torch.nn.Module, report: Report, format: str = "nvfp4") -> torch.nn.Module:
    """Copy a model with the selected weights rounded to FP4, by hand."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for row in report.selected:
            module = model.get_submodule(row.path)
            stored_KN = type(module).__name__ == "Conv1D"
            w = module.weight.T if stored_KN else module.weight
            rounded = fp4graph.quantize(w, format).dequantize(w.dtype)
            module.weight.copy_(rounded.T if stored_KN else rounded)
    return model


def byte_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Make a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
