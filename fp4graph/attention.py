"""Attention of one token over a cache: our CPU kernel, by transformers' own door."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fp4graph.errors import OptionError, RefusalError
from fp4graph.kernels.cpu.library import Missing, load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

ATTENTION = "fp4graph"
"""Its name, as `attn_implementation`."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"}
_MORE = {"softcap", *inspect.signature(sdpa_attention_forward).parameters} - {*_PLAIN, "kwargs"}


def set_attention(model: PreTrainedModel) -> None:
    """Let a model attend by our CPU kernel where one token comes at a time, else by SDPA.

    The kernel reads the cache as it lies: heads that share keys are not repeated, and slots that
    nothing attends to are skipped. It computes what SDPA does, in float32, within float rounding.
    On GPUs, with gradients, with dropout and with what SDPA alone knows, it is SDPA.

    Args:
        model: of transformers.

    Raises:
        RefusalError: there are no native CPU kernels here; or the model, or one within it, cannot
            attend by SDPA, as for learned sinks, and so not by us.
    """
    found = load()
    if isinstance(found, Missing):
        raise RefusalError(f"no attention without native CPU kernels: {found.reason}")
    before = model.config._attn_implementation
    why = _no_sdpa(model)
    if why is not None:
        model.set_attn_implementation(before)
        raise RefusalError(f"{type(model).__name__} cannot attend by fp4graph: {why}")
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


@contextmanager
def attending(model: PreTrainedModel, how: str | None) -> Iterator[None]:
    """Let a model attend by another implementation within; None leaves its own.

    Raises:
        OptionError: neither transformers nor this module has it, for this model.
    """
    before = model.config._attn_implementation
    if how is None or how == before:
        yield
        return
    try:
        set_attention(model) if how == ATTENTION else model.set_attn_implementation(how)
    except (ValueError, ImportError, RefusalError) as error:
        raise OptionError(f"attention={how!r}: {error}") from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _no_sdpa(model: PreTrainedModel) -> str | None:
    """Let a model attend by SDPA, which asks it whether it can; return why not, None if it can."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError as error:
        return str(error)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation != "sdpa":
            return f"{type(part).__name__} does not support SDPA"
    return None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    more = any(kwargs.get(name) is not None for name in _MORE)
    if more or dropout or not _serves(query, key, value, attention_mask):
        how: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        y, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **how, **kwargs)
        return y, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return torch.ops.fp4graph.cpu_attend(query, key, value, attention_mask, scale), None


def _serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    if query.device.type != "cpu" or query.dtype not in _DTYPES or query.shape[2] != 1:
        return False
    if key.shape != value.shape or key.dtype != query.dtype or value.dtype != query.dtype:
        return False
    if torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)):
        return False
    if mask is None or mask.dtype == query.dtype:
        return True
    return mask.dtype == torch.bool and mask.shape[1] == 1
