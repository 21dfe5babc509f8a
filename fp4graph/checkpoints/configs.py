"""What a checkpoint's configuration says of its quantised linears, for other programs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp4graph.checkpoints.fused import ENGINE_NAMES
from fp4graph.errors import OptionError, RefusalError
from fp4graph.formats import FP8
from fp4graph.scheme import Activations

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp4graph.formats import BlockFormat

    Way = tuple[BlockFormat, Activations]

_FP8 = "FP8_DYNAMIC"
_ALGOS = {
    ("nvfp4", Activations.SAME): "NVFP4",
    ("nvfp4", Activations.NONE): "W4A16_NVFP4",
    ("fp8", Activations.SAME): "FP8_PER_CHANNEL_PER_TOKEN",
}
"""What ModelOpt calls a way."""
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(.*)")


@dataclass(frozen=True)
class Chosen:
    """What runs how, by the names that linears have in the checkpoint.

    Attributes:
        ways: format and activations of each quantised linear.
        dense: names of all others.
    """

    ways: Mapping[str, Way]
    dense: Sequence[str]

    def groups(self) -> dict[Way, list[str]]:
        """Return the names of each way."""
        found: dict[Way, list[str]] = {}
        for name, way in self.ways.items():
            found.setdefault(way, []).append(name)
        return found


def compressed_tensors(chosen: Chosen) -> dict[str, Any]:
    """Return `quantization_config` for compressed-tensors: explicit targets, no two alike.

    Raises:
        OptionError: compressed-tensors is not installed.
    """
    try:
        from compressed_tensors.config import CompressionFormat
        from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    except ImportError:
        raise OptionError("compressed-tensors is needed: pip install 'fp4graph[export]'") from None
    groups, formats = {}, []
    for number, ((format, activations), names) in enumerate(chosen.groups().items()):
        rounds = activations is Activations.SAME
        preset = f"{format.base.upper()}{'' if rounds else 'A16'}"
        scheme = preset_name_to_scheme(_FP8 if format == FP8 else preset, _targets(names))
        kind = "float-quantized" if format == FP8 else f"{format.base}-pack-quantized"
        packed = CompressionFormat(kind).value
        inputs = scheme.input_activations if rounds else None
        update = {"format": packed, "input_activations": inputs}
        groups[f"group_{number}"] = scheme.model_copy(update=update)
        formats.append(packed)
    whole = formats[0] if len(set(formats)) == 1 else CompressionFormat.mixed_precision.value
    made = QuantizationConfig(
        config_groups=groups,
        format=whole,
        quantization_status="compressed",
        ignore=_targets(chosen.dense),
    )
    found: dict[str, Any] = made.model_dump(mode="json", exclude={"moe_sparsity_config"})
    return found


def modelopt(chosen: Chosen) -> dict[str, Any]:
    """Return `quantization_config` for ModelOpt's unified layout; `hf_quant` makes its other file.

    Raises:
        RefusalError: MXFP4, or FP8 of weights alone: no engine reads these in this layout.
    """
    ways = chosen.groups()
    wrong = next((way for way in ways if _algo(way) is None), None)
    if wrong is not None:
        raise RefusalError(
            f"ModelOpt's layout has no {wrong[0].base} {wrong[1].mode(wrong[0].bits)} that engines "
            "load (vLLM 0.33's LINEAR_ALGOS): write it for compressed-tensors"
        )
    algos = {way: _algo(way) for way in ways}
    groups = {
        f"group_{number}": {
            "weights": _modelopt_args(way[0], dynamic=False),
            "input_activations": (
                _modelopt_args(way[0], dynamic=way[0] == FP8)
                if way[1] is Activations.SAME
                else None
            ),
            "targets": sorted(names) if len(ways) > 1 else ["Linear"],
        }
        for number, (way, names) in enumerate(ways.items())
    }
    found: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": next(iter(algos.values())) if len(ways) == 1 else "MIXED_PRECISION",
        "group_size": 16,
        "kv_cache_quant_algo": None,
        "config_groups": groups,
        "ignore": _with_fused(chosen.dense),
        "exclude_modules": _with_fused(chosen.dense),
        "producer": {"name": "fp4graph", "version": _version()},
    }
    if len(ways) > 1:
        found["quantized_layers"] = {
            name: {"quant_algo": algos[way], "group_size": 16}
            for way, names in ways.items()
            for name in sorted(names)
        }
    return found


def hf_quant(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `hf_quant_config.json` holds beside that: all four keys, always."""
    keys = ("quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules")
    more = ("quantized_layers",) if "quantized_layers" in config else ()
    quantization = {key: config[key] for key in (*keys, *more)}
    return {"producer": config["producer"], "quantization": quantization}


def _with_fused(names: Iterable[str]) -> list[str]:
    """Return names, and what engines call the sets of them: SGLang asks for no other name."""
    found = set(names)
    for name in list(found):
        parent, _, last = name.rpartition(".")
        fused = next((key for key, parts in ENGINE_NAMES.items() if last in parts), None)
        if fused is not None:
            found.add(f"{parent}.{fused}")
    return sorted(found)


def _algo(way: Way) -> str | None:
    return _ALGOS.get((way[0].base, way[1]))


def _modelopt_args(format: BlockFormat, *, dynamic: bool) -> dict[str, Any]:
    args = {"dynamic": dynamic, "num_bits": format.bits, "type": "float"}
    return args if format == FP8 else {**args, "group_size": format.block_size}


def _targets(names: Iterable[str]) -> list[str]:
    """Return names as they are, and of experts one pattern a layer and linear."""
    plain: list[str] = []
    experts: dict[str, None] = {}
    for name in sorted(names):
        found = _EXPERT.fullmatch(name)
        if found is None:
            plain.append(name)
            continue
        parent, last = found.groups()
        experts[rf"re:^{re.escape(parent)}\.\d+\.{re.escape(last)}$"] = None
    return [*plain, *experts]


def _version() -> str:
    from importlib.metadata import version

    return version("fp4graph")
