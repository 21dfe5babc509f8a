"""Tiny random models of every causal architecture that transformers knows."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
import transformers
from support.tiny_configs import DROP, FIX, HIDDEN, LAYERS, RULES, SEQ, VOCAB
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
BATCH = 2
_MOST = 60_000_000  # parameters
_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}


def build(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model of a type, float32, whose output hangs on all its weights, and its inputs."""
    config = tiny_config(kind)
    torch.manual_seed(0)
    if "~" in FIX.get(kind, {}):
        model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])(config).float()
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if sum(p.numel() for p in model.parameters()) > _MOST:
        raise ValueError(f"{kind}: its config is not tiny")
    give_unit_gain(model)
    books = config.num_codebooks if kind.startswith("musicgen") else 1
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {
        "input_ids": torch.randint(5, 90, (BATCH * books, SEQ), generator=generator)
    }
    known = inspect.signature(model.forward).parameters
    if "use_cache" in known or any(p.kind == p.VAR_KEYWORD for p in known.values()):
        inputs["use_cache"] = False
    return model.eval(), inputs


@torch.no_grad()
def call(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the first tensor of floats that a model gives."""
    torch.manual_seed(1)
    out = model(**inputs)
    for name in ("logits", "last_hidden_state", "prediction_logits"):
        if isinstance(getattr(out, name, None), Tensor):
            return getattr(out, name).clone()
    values = out.values() if hasattr(out, "values") else out
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point()).clone()


def tiny_config(kind: str) -> PretrainedConfig:
    """Return the default config of a type with everything large made small."""
    cls = CONFIG_MAPPING[kind]
    fix = dict(FIX.get(kind, {}))
    if "~" in fix:  # the causal model takes a part of the config
        cls = type(getattr(cls(), fix.pop("~")))
    needed = {key[1:]: value for key, value in fix.items() if key.startswith("@")}
    kwargs = {**_shrunk(cls(**needed).to_dict(), {}), **needed}
    for key, value in fix.items():
        if not key.startswith("@"):
            _put(kwargs, key, value)
    config = cls(**kwargs)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _put(kwargs: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        kwargs = kwargs.setdefault(part, {})
    kwargs[last] = value


def _shrunk(config: dict[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    """Return what is to be another value than by default."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if name in DROP or value is None or isinstance(value, bool):
            continue
        if isinstance(value, dict):
            if value.get("model_type") or name.endswith("config"):
                out[name] = _shrunk(value, tokens)
                if value.get("model_type"):
                    out[name]["model_type"] = value["model_type"]
        elif isinstance(value, list):
            short = _shorter(name, value)
            if short is not None:
                out[name] = short
        elif isinstance(value, int):
            small = _smaller(name, value, config, tokens)
            if small != value:
                out[name] = small
    return out


def _shorter(name: str, values: list[Any]) -> list[Any] | None:
    """Return a list by layers for fewer layers, of every kind that there is if possible."""
    if len(values) >= 2 and all(isinstance(each, str) for each in values):
        if not re.search(r"types?$|layers$", name):
            return None
        kinds = list(dict.fromkeys(values))
        return (kinds * LAYERS)[:LAYERS] if len(kinds) <= LAYERS else kinds[:LAYERS]
    by_layer = r"layers|idxs|_ids|indexes|indices|heads_per_layer|sparsity_pattern|rope_theta"
    if not values or not re.search(by_layer, name):
        return None
    if all(each in (0, 1) for each in values) or len(set(map(str, values))) <= 2:
        return [4 if "heads" in name else each for each in values[:LAYERS]]
    return [each for each in values if isinstance(each, int) and each < LAYERS] or [1]


def _smaller(name: str, value: int, config: dict[str, Any], tokens: dict[str, int]) -> Any:
    if config.get("qk_rope_head_dim"):  # latent attention: rope on a part of the head
        if name == "num_key_value_heads":
            return 4
        if name == "head_dim":
            whole = 24 if value == config.get("qk_head_dim") else 16
            return 8 if value == config["qk_rope_head_dim"] else whole
    for pattern, new in RULES:
        if re.fullmatch(pattern, name):
            if new == "token":
                return _token(name, value, tokens)
            return value if new is None else new(value) if callable(new) else new
    return HIDDEN if value > 256 else value


def _token(name: str, value: int, tokens: dict[str, int]) -> int:
    if value < 4:
        return value
    if name in _TOKENS:
        return _TOKENS[name]
    return tokens.setdefault(name, VOCAB - 1 - len(tokens))


@torch.no_grad()
def give_unit_gain(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if name == "weight" and isinstance(module, nn.Linear):
                p.normal_(0, p.shape[1] ** -0.5)
            elif name == "weight" and type(module).__name__ == "Conv1D":
                p.normal_(0, p.shape[0] ** -0.5)
            elif p.ndim >= 3 and "expert" in f"{path}.{name}":
                p.normal_(0, HIDDEN**-0.5)
            elif p.ndim >= 2 and not (bool(p.isfinite().all()) and bool(p.any())):
                p.normal_(0, 0.02)
