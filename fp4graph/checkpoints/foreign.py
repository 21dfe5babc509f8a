"""Packed checkpoints of compressed-tensors, ModelOpt and gpt-oss, turned into fp4graph's own.

Codes and scales stay as they are; FP8 of other kinds than E4M3 becomes dense.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fp4graph.checkpoints.layouts import COMPRESSED_TENSORS, MODELOPT, Layout
from fp4graph.checkpoints.names import Names, OnDisk
from fp4graph.checkpoints.shards import Shards
from fp4graph.conversion import plan
from fp4graph.errors import ModelError
from fp4graph.formats import MXFP4, PackedWeight
from fp4graph.linears.selector import Selector
from fp4graph.linears.texts import selectors_for
from fp4graph.policy import Policy
from fp4graph.replacement import place_of
from fp4graph.scheme import Activations, Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from fp4graph.linears.tags import LinearTag

_GPT_OSS = "mxfp4"
METHODS = {"compressed-tensors": COMPRESSED_TENSORS, "modelopt": MODELOPT, _GPT_OSS: None}
"""The layouts that are read, by what a configuration calls the method."""

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_ROUNDS_EACH_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"  # so that the file has no scale of inputs
_INPUTS = ("input_global_scale", "input_scale")


@dataclass(frozen=True)
class Foreign:
    """A checkpoint in fp4graph's own layout.

    Attributes:
        policy: what runs how.
        tensors: by the names that the model's state dict has; dense ones by the checkpoint's.
    """

    policy: Policy
    tensors: dict[str, Tensor]


def layout_of(config: Any) -> dict[str, Any] | None:
    """Return what a configuration says of its weights, if they are in a layout of others."""
    found = getattr(config, "quantization_config", None) or {}
    found = found if isinstance(found, dict) else found.to_dict()
    return found if found.get("quant_method") in METHODS else None


def read_foreign(
    folder: Path, model: nn.Module, config: Mapping[str, Any], dtype: torch.dtype
) -> Foreign:
    """Read a checkpoint that is packed in a layout of others.

    Args:
        folder: the checkpoint.
        model: the dense model without its weights, on the meta device.
        config: what its configuration says of them, `quant_method` of `METHODS`.
        dtype: of what FP8 weights become.

    Raises:
        ModelError: a tensor is missing or is not what the layout says; packed weights that belong
            to no linear; experts whose weights do not go together.
    """
    shards = Shards(folder)
    layout = METHODS[config["quant_method"]]
    weights, rest = _gpt_oss(shards) if layout is None else _packed(shards, layout, dtype)
    matrices = {f"{path}.weight": packed for path, packed in weights.items()}
    names = Names(model, [*matrices, *rest])
    _, _, tags = plan(model, Policy(((Selector("none"), None),)))
    by_path: dict[str, dict[str, PackedWeight]] = defaultdict(dict)
    for name, packed in matrices.items():
        by_path[_linear(names, name).path][name] = packed
    inputs = {path for path in weights if _rounds(shards, path, config)}
    ways: dict[Scheme, list[LinearTag]] = defaultdict(list)
    stacks: dict[str, list[PackedWeight]] = {}
    known = {tag.fqn: tag for tag in tags}
    for path, parts in by_path.items():
        if path not in known:
            raise ModelError(f"{path} is packed, and is no linear that the model calls")
        stacks[path] = _whole(path, parts, names)
        rounds = next(iter(parts)).removesuffix(".weight") in inputs
        mode = Activations.SAME if rounds else Activations.NONE
        ways[Scheme(stacks[path][0].format, activations=mode)].append(known[path])
    policy = Policy(
        tuple(
            (Selector(text), scheme)
            for scheme, members in ways.items()
            for text in selectors_for(members, tags)
        )
    )
    return Foreign(policy, rest | _own(model, policy, stacks))


def _own(
    model: nn.Module, policy: Policy, stacks: Mapping[str, Sequence[PackedWeight]]
) -> dict[str, Tensor]:
    """Return weights as the modules that own them have them in their state dicts."""
    found: dict[str, Tensor] = {}
    for site in plan(model, policy)[0]:
        place, packed = place_of(model, site), stacks[site.tag.fqn]
        assert place is not None
        prefix = place.owner if place.is_linear else place.parameter
        expected = site.tag.shape[-2:]
        count = site.tag.shape[0] if site.is_stack else 1
        if packed[0].shape != expected or len(packed) != count:
            shape = [len(packed), *packed[0].shape]
            raise ModelError(f"{site.tag.fqn} is packed as {shape}: expected {list(expected)}")
        for name in ("qdata", "scale", "per_tensor_scale"):
            parts = [getattr(each, name) for each in packed]
            if parts[0] is None:
                continue
            small = parts[0].element_size() == 1
            stacked = torch.stack([each.view(torch.uint8) if small else each for each in parts])
            whole = stacked if site.is_stack else stacked[0]
            found[f"{prefix}.{name}"] = whole.view(parts[0].dtype)
    return found


def _packed(
    shards: Shards, layout: Layout, dtype: torch.dtype
) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
    """Return a checkpoint's packed weights by their paths, and all other tensors."""
    weights: dict[str, PackedWeight] = {}
    rest: dict[str, Tensor] = {}
    parts = layout.parts
    scales = sorted(name for name in shards.files if name.endswith(".weight_scale"))
    quantised = dict.fromkeys(name.rpartition(".")[0] for name in scales)
    for path in quantised:
        there = [each for each in (*parts, "weight") if f"{path}.{each}" in shards]
        tensors = {each: shards.get(f"{path}.{each}") for each in there}
        codes = tensors.get(layout.qdata, tensors.get("weight"))
        if codes is None:
            raise ModelError(f"{path} has scales, and no codes ({layout.qdata})")
        if codes.dtype == torch.uint8 or _has_scales_by_row(codes, tensors["weight_scale"]):
            weights[path] = layout.read(tensors, path)
        elif codes.dtype in _FP8:
            rest[f"{path}.weight"] = _from_fp8(codes, tensors["weight_scale"], dtype, path)
        else:
            raise ModelError(f"{path} is {codes.dtype}: FP4 and FP8 are read")
    names = {*parts, *_INPUTS, "weight"}
    for name in shards.files:
        path, _, last = name.rpartition(".")
        if path not in quantised or last not in names:
            rest[name] = shards.get(name)
    return weights, rest


def _has_scales_by_row(codes: Tensor, scale: Tensor) -> bool:
    """Whether an FP8 weight is what fp4graph has kernels for: E4M3, a scale a row or one of all."""
    return codes.dtype == torch.float8_e4m3fn and scale.numel() in (1, codes.shape[0])


def _from_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    if scale.ndim > 2 or (scale.numel() not in (1, weight.shape[0])):
        raise ModelError(f"{path} is FP8 with scales {list(scale.shape)}, which are not read")
    factor = scale.float().reshape(-1, 1) if scale.numel() > 1 else scale.float().reshape(())
    return (weight.float() * factor).to(dtype)


def _gpt_oss(shards: Shards) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
    """Return gpt-oss' experts as `PATH[number]`; gate and up rows are interleaved, as in the model.

    `*_blocks` uint8 [E, N, K/32, 16], `*_scales` uint8 [E, N, K/32].
    """
    weights: dict[str, PackedWeight] = {}
    rest: dict[str, Tensor] = {}
    for name in shards.files:
        path, _, kind = name.rpartition("_")
        if kind == "blocks":
            blocks, scales = shards.get(name), shards.get(f"{path}_scales")
            if blocks.ndim != 4 or blocks.shape[3] != 16 or scales.shape != blocks.shape[:3]:
                shapes = f"{list(blocks.shape)} and {list(scales.shape)}"
                raise ModelError(f"{path} is {shapes}: expected [E, N, K/32, 16] and [E, N, K/32]")
            shape = (blocks.shape[1], blocks.shape[2] * 32)
            for expert, (each, scale) in enumerate(zip(blocks, scales, strict=True)):
                made = scale.contiguous().view(MXFP4.scale_codec.dtype)
                packed = PackedWeight(each.flatten(1), made, None, shape, MXFP4)
                weights[f"{path}[{expert}]"] = packed
        elif kind != "scales":
            rest[name] = shards.get(name)
    return weights, rest


def _rounds(shards: Shards, path: str, config: Mapping[str, Any]) -> bool:
    """Whether a linear's inputs are rounded too: the file has their scale, or its group says so.

    Of a group's targets a name comes before a pattern, and a pattern before a class, as
    compressed-tensors has it.
    """
    if any(f"{path}.{name}" in shards for name in _INPUTS):
        return True
    groups = (config.get("config_groups") or {}).values()
    if config["quant_method"] != COMPRESSED_TENSORS.name:
        listed = (config.get("quantized_layers") or {}).get(path) or config
        return str(listed.get("quant_algo", "")).upper() == _ROUNDS_EACH_TOKEN
    targets = {target: group for group in groups for target in group.get("targets") or ()}
    for target in sorted(targets, key=lambda each: ("re:" in each, each)):
        pattern = target.removeprefix("re:")
        if path == target or (pattern != target and re.match(pattern, path)):
            return bool(targets[target].get("input_activations"))
    return bool((targets.get("Linear") or {}).get("input_activations"))


def _whole(path: str, parts: Mapping[str, PackedWeight], names: Names) -> list[PackedWeight]:
    """Return a linear's weight, or those of a stack's experts in order; gate before up.

    Raises:
        ModelError: experts are missing, or gate and up have two per-tensor scales.
    """
    if _linear(names, next(iter(parts))).expert is None:
        return list(parts.values())
    experts: dict[int, list[tuple[int, PackedWeight]]] = defaultdict(list)
    for name, packed in parts.items():
        linear = _linear(names, name)
        assert linear.expert is not None
        experts[linear.expert].append((linear.place, packed))
    if sorted(experts) != list(range(len(experts))):
        raise ModelError(f"{path}: some experts are missing")
    ordered = [sorted(experts[number], key=_place) for number in sorted(experts)]
    return [_joined(path, [packed for _, packed in each]) for each in ordered]


def _linear(names: Names, name: str) -> OnDisk:
    """Return what a packed weight is of.

    Raises:
        ModelError: no linear of the model.
    """
    path = name.removesuffix(".weight")
    if path.endswith("]"):  # of gpt-oss, where the stack has the parameter's own name
        stack, _, number = path.removesuffix("]").rpartition("[")
        return OnDisk(stack, int(number))
    if name not in names.linears:
        raise ModelError(f"{path} is packed, and is no linear of the model")
    return names.linears[name]


def _place(pair: tuple[int, PackedWeight]) -> int:
    return pair[0]


def _joined(path: str, parts: Sequence[PackedWeight]) -> PackedWeight:
    first = parts[0]
    tops = [each.per_tensor_scale for each in parts if each.per_tensor_scale is not None]
    if any(float(top) != float(tops[0]) for top in tops):
        raise ModelError(f"{path}: an expert's gate and up have two per-tensor scales")
    return PackedWeight(
        torch.cat([each.qdata for each in parts]),
        torch.cat([each.scale.view(torch.uint8) for each in parts]).view(first.scale.dtype),
        first.per_tensor_scale,
        (sum(each.shape[0] for each in parts), first.shape[1]),
        first.format,
    )
