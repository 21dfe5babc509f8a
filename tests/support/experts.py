"""Models with experts in every layout: stored [E, N, K] or [E, K, N], grouped, batched, indexed."""

from __future__ import annotations

import torch
import transformers as hf
from support.models import tiny
from torch import Tensor, nn

E, N, K = 3, 48, 40


class Indexed(nn.Module):
    """Two linears of the expert that `which` says, one stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, N, K))
        self.bias = nn.Parameter(torch.randn(E, N))
        self.down = nn.Parameter(torch.randn(E, N, K))

    def forward(self, x: Tensor, which: Tensor | int) -> Tensor:
        h = nn.functional.linear(x, self.up[which], self.bias[which]).relu()
        return h @ self.down[which]


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(E, K, N))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.experts)


def llama4() -> nn.Module:
    torch.manual_seed(0)
    config = hf.Llama4TextConfig(
        hidden_size=64, intermediate_size=48, intermediate_size_mlp=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4,
        vocab_size=96, interleave_moe_layer_step=1, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return random(hf.Llama4ForCausalLM(config))


def gpt_oss(intermediate_size: int = 48) -> nn.Module:
    torch.manual_seed(0)
    config = hf.GptOssConfig(
        hidden_size=64, intermediate_size=intermediate_size, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=96, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return random(hf.GptOssForCausalLM(config))


def random(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.08)
    return model.eval()


MODELS = {
    "mixtral": lambda: tiny("mixtral"),
    "gpt_oss": gpt_oss,  # stored [E, in, out], with biases
    "llama4": llama4,  # as many rows for each expert
}
