"""Diffusion transformers of diffusers, made tiny, with inputs; weights are random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from support.architectures import give_unit_gain

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

HEAD, HEADS = 16, 4
WIDTH = HEAD * HEADS
TEXT = 6


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _flux(d: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = d.FluxTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=HEAD,
        num_attention_heads=HEADS, joint_attention_dim=32, pooled_projection_dim=24,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    inputs = {
        "hidden_states": _noise(1, 16, 8),
        "encoder_hidden_states": _noise(1, TEXT, 32),
        "pooled_projections": _noise(1, 24),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return model, inputs


def _sd3(d: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = d.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=HEAD,
        num_attention_heads=HEADS, joint_attention_dim=32, caption_projection_dim=WIDTH,
        pooled_projection_dim=24, out_channels=4, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    inputs = {
        "hidden_states": _noise(1, 4, 8, 8),
        "encoder_hidden_states": _noise(1, TEXT, 32),
        "pooled_projections": _noise(1, 24),
        "timestep": torch.tensor([500]),
    }
    return model, inputs


def _wan(d: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = d.WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, out_channels=4,
        text_dim=32, freq_dim=32, ffn_dim=96, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": _noise(1, 4, 2, 4, 4),
        "encoder_hidden_states": _noise(1, TEXT, 32),
        "timestep": torch.tensor([500]),
    }
    return model, inputs


def _qwen_image(d: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = d.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=HEAD,
        num_attention_heads=HEADS, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    inputs = {
        "hidden_states": _noise(1, 16, 16),
        "encoder_hidden_states": _noise(1, TEXT, 32),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.int64),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, 4, 4)],
    }
    return model, inputs


def _pixart(d: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = d.PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, out_channels=8,
        num_layers=3, cross_attention_dim=WIDTH, sample_size=8, patch_size=2, caption_channels=32,
        use_additional_conditions=False, norm_num_groups=4,
    )  # fmt: skip
    inputs = {
        "hidden_states": _noise(1, 4, 8, 8),
        "encoder_hidden_states": _noise(1, TEXT, 32),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs


DIFFUSION: dict[str, Callable[[Any], tuple[nn.Module, dict[str, Any]]]] = {
    "FLUX": _flux,
    "Stable Diffusion 3": _sd3,
    "Wan": _wan,
    "Qwen-Image": _qwen_image,
    "PixArt": _pixart,
}


def build_diffusion(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model, float32, whose output depends on all its weights, and its inputs."""
    import diffusers

    torch.manual_seed(0)
    model, inputs = DIFFUSION[kind](diffusers)
    give_unit_gain(model)
    return model.eval(), {**inputs, "return_dict": False}
