"""The engines' rules: which of a configuration's entries a layer meets, and what runs then.

Read in the sources of vLLM 0.33.0 (`quantization/compressed_tensors/utils.py`,
`compressed_tensors.py`, `modelopt.py`, `utils/config_utils.py`, `utils/quant_utils.py`), SGLang
0.5.23 (the same names) and compressed-tensors, which is asked itself.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from torch import nn

from fp4graph.errors import OptionError
from fp4graph.serve.checkpoint import DENSE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp4graph.serve.checkpoint import Checkpoint
    from fp4graph.serve.layers import Layer


class Refused(Exception):
    """The engine would end with an error; says which."""


def vllm(checkpoint: Checkpoint, layer: Layer) -> str:
    """Return how vLLM 0.33 runs a layer.

    Raises:
        Refused: it would not start.
    """
    if checkpoint.method == "modelopt":
        return _vllm_modelopt(checkpoint.config, layer)
    if checkpoint.method != "compressed-tensors":
        return _other(checkpoint.method)
    if layer.is_experts:
        answers = {_vllm_one(checkpoint, name, layer) for name in layer.shards}
        if len(answers) > 1:
            raise Refused("all projections of the experts need the same scheme")
        return answers.pop() if answers else DENSE
    if _ignored_by_vllm(checkpoint, layer):
        return DENSE
    targets = _targets(checkpoint)
    found = (
        _first(layer.name, targets)
        or (_all_shards(layer, targets) if layer.is_fused else None)
        or _by_class(layer.kind, targets)
    )
    if found is None:
        return DENSE
    try:
        return _vllm_scheme(targets[found])
    except Refused:
        if layer.kind == "ParallelLMHead":
            return DENSE
        raise


def _vllm_one(checkpoint: Checkpoint, name: str, layer: Layer) -> str:
    """Return what one expert's linear meets; class names are matched as `RoutedExperts`."""
    if any(_equal(name, each) for each in checkpoint.config.get("ignore") or ()):
        return DENSE
    targets = _targets(checkpoint)
    found = _first(name, targets)
    if found is None and "Linear" in targets:
        found = "Linear"
    found = found or _by_class(layer.kind, targets)
    return DENSE if found is None else _vllm_scheme(targets[found])


def sglang(checkpoint: Checkpoint, layer: Layer) -> str:
    """Return how SGLang 0.5.23 runs a layer.

    Raises:
        Refused: it would not start.
    """
    if checkpoint.method == "modelopt":
        return _sglang_modelopt(checkpoint.config, layer)
    if checkpoint.method != "compressed-tensors":
        return _other(checkpoint.method)
    names = layer.shards if layer.is_experts else (layer.name,)
    answers = set()
    for name in names:
        if _ignored_by_sglang(checkpoint, layer, name):
            answers.add(DENSE)
            continue
        targets = _targets(checkpoint)
        found = _first(name, targets) or _by_class(layer.kind, targets)
        if found is None and layer.is_fused and not layer.is_experts:
            found = _all_shards(layer, targets)
        if found is None and layer.is_experts and "Linear" in targets:
            found = "Linear"
        if found is None:
            if layer.kind == "ParallelLMHead":
                answers.add(DENSE)
                continue
            raise Refused("no target of the configuration matches it, and it is not in `ignore`")
        answers.add(_sglang_scheme(targets[found]))
    if len(answers) > 1:
        raise Refused("its experts' projections run in several ways")
    return answers.pop() if answers else DENSE


def _ignored_by_sglang(checkpoint: Checkpoint, layer: Layer, name: str) -> bool:
    ignore = checkpoint.config.get("ignore") or []
    if layer.is_experts or not layer.is_fused or layer.name in ignore:
        return any(_equal_or_end(name, each) for each in ignore)
    shards = {any(_equal_or_end(shard, each) for each in ignore) for shard in layer.shards}
    if len(shards) > 1:
        raise Refused("its shards have different schemes; SGLang requires all to use the same")
    return shards.pop()


def compressed_tensors(checkpoint: Checkpoint, layer: Layer) -> dict[str, str]:
    """Return how compressed-tensors itself, and transformers by it, runs each linear of a layer.

    Raises:
        Refused: the layout is another one.
        OptionError: compressed-tensors is not installed.
    """
    try:
        from compressed_tensors.utils.match import is_match, match_targets
    except ImportError:
        raise OptionError("compressed-tensors is needed: pip install 'fp4graph[export]'") from None
    if checkpoint.method != "compressed-tensors":
        raise Refused(f"the layout is {checkpoint.method or 'dense'}")
    targets, found = _targets(checkpoint), {}
    module = nn.Linear(1, 1, device="meta")
    for linear in layer.linears:
        ignored = is_match(linear.name, module, checkpoint.config.get("ignore") or [])
        matched = [] if ignored else match_targets(linear.name, module, list(targets))
        found[linear.name] = _scheme(targets[matched[0]]) if matched else DENSE
    return found


def _other(method: str) -> str:
    if not method:
        return DENSE
    raise Refused(f"the layout {method!r} is not looked through here")


def _targets(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """Return each target's group; of two groups with one target the last counts."""
    return {target: group for group in checkpoint.groups for target in group.get("targets") or ()}


def _ignored_by_vllm(checkpoint: Checkpoint, layer: Layer) -> bool:
    ignore = checkpoint.config.get("ignore") or []
    if any(_equal(layer.name, each) for each in ignore):
        return True
    if not layer.is_fused:
        return False
    shards = {any(_equal(shard, each) for each in ignore) for shard in layer.shards}
    if len(shards) > 1:
        raise Refused("its shards have different schemes; vLLM requires all to use the same")
    return shards.pop()


def _equal(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return name == target


def _equal_or_end(name: str, target: str) -> bool:
    return _equal(name, target) or (not target.startswith("re:") and name.endswith(f".{target}"))


def _first(name: str, targets: Iterable[str]) -> str | None:
    return next((target for target in targets if _equal(name, target)), None)


def _all_shards(layer: Layer, targets: Iterable[str]) -> str | None:
    known = list(targets)
    found = [_first(shard, known) for shard in layer.shards]
    return found[0] if all(found) else None


def _by_class(kind: str, targets: Iterable[str]) -> str | None:
    """Return the first target that the class's name contains, in any case, as vLLM looks for it."""
    classes = (target for target in targets if not target.startswith("re:"))
    return next((target for target in classes if target.lower() in kind.lower()), None)


def _args(group: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = group.get(name) or {}
    return found if isinstance(found, dict) else {}


def _is_nvfp4(args: Mapping[str, Any]) -> bool:
    return _is_fp4(args, "tensor_group", 16)


def _is_mxfp4(args: Mapping[str, Any]) -> bool:
    return _is_fp4(args, "group", 32)


def _is_fp4(args: Mapping[str, Any], strategy: str, size: int) -> bool:
    known = (args.get("num_bits"), args.get("type"), args.get("strategy"), args.get("group_size"))
    return known == (4, "float", strategy, size) and args.get("symmetric", True) is True


def _scheme(group: Mapping[str, Any]) -> str:
    """Return what a group says, as it says it."""
    weights, inputs = _args(group, "weights"), _args(group, "input_activations")
    mode = "W4A4" if inputs else "W4A16"
    if _is_nvfp4(weights):
        return f"nvfp4 {mode}"
    if _is_mxfp4(weights):
        return f"mxfp4 {mode}"
    if weights.get("type") == "float" and weights.get("num_bits") == 8:
        return f"fp8 {'W8A8' if inputs else 'W8A16'}"
    return "of another kind"


MXFP4_ON_VLLM = "mxfp4 W4A4 on sm_100, W4A16 elsewhere"


def _vllm_scheme(group: Mapping[str, Any]) -> str:
    weights, inputs = _args(group, "weights"), _args(group, "input_activations")
    if _is_nvfp4(weights) and inputs and not _is_nvfp4(inputs):
        raise Refused("for NVFP4 weights inputs must be NVFP4 too, or left as they are")
    return MXFP4_ON_VLLM if _is_mxfp4(weights) else _scheme(group)


def _sglang_scheme(group: Mapping[str, Any]) -> str:
    if _is_mxfp4(_args(group, "weights")):
        raise Refused("SGLang has no scheme for linears in MXFP4 of compressed-tensors")
    return _scheme(group)


def _vllm_modelopt(config: Mapping[str, Any], layer: Layer) -> str:
    excluded = list(config.get("exclude_modules") or config.get("ignore") or [])
    if _excluded_by_vllm(layer, excluded):
        return DENSE
    algo = str(config.get("quant_algo", "")).upper()
    if algo == "MIXED_PRECISION":
        algo = _mixed_algo(config, layer)
        if not algo:
            return DENSE
    elif algo == "NVFP4" and config.get("config_groups"):
        groups = config["config_groups"].values()
        if all(group.get("input_activations") is None for group in groups):
            algo = "W4A16_NVFP4"
    return _algo(algo)


def _excluded_by_vllm(layer: Layer, excluded: Sequence[str]) -> bool:
    if layer.name in excluded:
        return True
    if layer.is_fused and not layer.is_experts:
        shards = {shard in excluded for shard in layer.shards}
        if len(shards) > 1:
            raise Refused("some of its shards are excluded; vLLM requires all to have the same")
        if True in shards:
            return True
    return any(each in layer.name or fnmatch(layer.name, each) for each in excluded)


def _mixed_algo(config: Mapping[str, Any], layer: Layer) -> str:
    listed: Mapping[str, Any] = config.get("quantized_layers") or {}
    if not listed:
        raise Refused("MIXED_PRECISION needs `quantized_layers`")
    names = (name for name in (layer.name, *layer.shards) if name in listed)
    found = {str(listed[name]["quant_algo"]).upper() for name in names}
    if not found:
        inside = (each for name, each in listed.items() if name.startswith(f"{layer.name}."))
        return next((str(each["quant_algo"]).upper() for each in inside), "")
    if len(found) > 1:
        raise Refused(f"its shards are listed as {' and '.join(sorted(found))}")
    return found.pop()


def _sglang_modelopt(config: Mapping[str, Any], layer: Layer) -> str:
    excluded = list(config.get("exclude_modules") or config.get("ignore") or [])
    for each in excluded:
        pattern = re.compile(re.escape(each).replace(r"\*", ".*"))
        if pattern.fullmatch(layer.name) or any(map(pattern.fullmatch, layer.name.split("."))):
            return DENSE
    algo = str(config.get("quant_algo", "")).upper()
    if algo == "MIXED_PRECISION":
        algo = _mixed_algo(config, layer)
        return _algo(algo) if algo else DENSE
    return _algo(algo)


_FP8 = {"FP8": "fp8 W8A8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8 W8A8"}


def _algo(algo: str) -> str:
    known = {"NVFP4": "nvfp4 W4A4", "W4A16_NVFP4": "nvfp4 W4A16", **_FP8}
    if algo not in known:
        raise Refused(f"there is no quant_algo {algo!r} for linears")
    return known[algo]
