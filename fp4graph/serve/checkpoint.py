"""What lies on disk: each linear's kind, by the heads of its files, and its per-tensor scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fp4graph.checkpoints.layouts import COMPRESSED_TENSORS, MODELOPT
from fp4graph.checkpoints.shards import Shards, read_json
from fp4graph.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

DENSE = "dense"
_EMBEDDING = ("embed_tokens", "wte", "word_embeddings", "embeddings", "embed_in")


@dataclass(frozen=True)
class Linear:
    """A linear as it is stored.

    Attributes:
        name: its path, as the checkpoint has it.
        kind: `nvfp4`, `mxfp4`, `fp8` or `dense`.
        rounds: whether the scale of its inputs is there, as W4A4 needs it.
        top: the per-tensor scale as it is stored; None where there is none.
        largest: the largest magnitude that block scales and `top` stand for; None without `top`.
    """

    name: str
    kind: str
    rounds: bool = False
    top: float | None = None
    largest: float | None = None

    @property
    def last(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def parent(self) -> str:
        """The path of the module that it is in."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with its linears and what it says of them.

    Attributes:
        config: `quantization_config`; empty for a dense model.
        linears: in order of their names.
    """

    config: dict[str, Any]
    linears: tuple[Linear, ...]

    @property
    def method(self) -> str:
        """What the configuration calls its layout."""
        return str(self.config.get("quant_method", ""))

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The configuration's groups, in order."""
        groups = self.config.get("config_groups") or {}
        return [each for each in groups.values() if isinstance(each, dict)]


def read(folder: Path) -> Checkpoint:
    """Look through a folder; of tensors, only per-tensor and block scales are read.

    Raises:
        ModelError: it cannot be read.
    """
    shards = Shards(folder)
    config = read_json(folder / "config.json")
    found: Any = config.get("quantization_config") or {}
    if not found and (folder / "hf_quant_config.json").is_file():
        whole: Any = read_json(folder / "hf_quant_config.json")
        found = {"quant_method": "modelopt", **(whole.get("quantization") or {})}
    if not isinstance(found, dict):
        raise ModelError(f"{folder}: quantization_config is no object")
    paths = sorted({name.rpartition(".")[0] for name in shards.files})
    linears = [linear for path in paths if (linear := _linear(shards, path)) is not None]
    return Checkpoint(found, tuple(linears))


def _linear(shards: Shards, path: str) -> Linear | None:
    if path.rpartition(".")[2] in _EMBEDDING:
        return None
    layout = COMPRESSED_TENSORS if f"{path}.weight_packed" in shards else MODELOPT
    codes = f"{path}.{layout.qdata}"
    if codes not in shards or len(shards.shape(codes)) != 2:
        return None
    dtype = shards.dtype(codes)
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return Linear(path, "fp8")
    if dtype != "U8":
        return Linear(path, DENSE)
    rounds = f"{path}.{layout.input_scale}" in shards
    if f"{path}.{layout.per_tensor_scale}" not in shards:
        return Linear(path, "mxfp4", rounds)
    top = float(shards.get(f"{path}.{layout.per_tensor_scale}").reshape(-1)[0])
    scale = shards.get(f"{path}.{layout.scale}").to(torch.float32)
    factor = (1 / top if top else float("inf")) if layout.divides else top
    return Linear(path, "nvfp4", rounds, top, 6 * float(scale.max()) * factor)
