"""Codes found with data, kept in one file: what `backend(calibration=...)` takes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fp4graph.errors import CalibrationError
from fp4graph.files import written_whole
from fp4graph.fingerprint import fingerprint
from fp4graph.formats import PackedWeight, get_format
from fp4graph.quantizers.quantizer import Quantizer
from fp4graph.quantizers.transform import Transform

if TYPE_CHECKING:
    from torch import Tensor

    from fp4graph.formats import BlockFormat

_KIND = "fp4graph calibration"


def matrix_name(fqn: str, expert: int | None) -> str:
    """Return what a matrix goes by: its linear's path, of experts with their number."""
    return fqn if expert is None else f"{fqn}[{expert}]"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Packed weights keyed by `matrix_name` (one per expert), with the facts they depend on.

    Attributes:
        format: of the weights.
        quantizer: how the codes were found.
        packed: the weights.
        smooth: what the columns of some of them were multiplied by, float32 [K] each.
        fingerprints: hash of each dense weight, as [N, K], that was packed.
        about: further facts for the reader: model, text, samples, versions.
    """

    format: BlockFormat
    quantizer: Quantizer
    packed: dict[str, PackedWeight]
    smooth: dict[str, Tensor]
    fingerprints: dict[str, int]
    about: dict[str, Any]

    def transform(self, fqn: str) -> Transform:
        """Return what a weight was multiplied by before it was rounded."""
        return Transform(self.quantizer.rotation, self.smooth.get(fqn))

    def dequantize(self, fqn: str) -> Tensor:
        """Return the weight that a linear's codes stand for, for inputs as they are; [N, K]."""
        return self.transform(fqn).undo(self.packed[fqn].dequantize())

    def check(self, format: BlockFormat) -> None:
        """Check that the codes are of a format.

        Raises:
            CalibrationError: they are of another.
        """
        if format != self.format:
            raise CalibrationError(
                f"the calibration is for {self.format}, and {format} is asked for: "
                f'say format="{self.format}"'
            )

    def get(self, fqn: str, w_NK: Tensor) -> PackedWeight:
        """Return the packed form of a weight.

        Raises:
            CalibrationError: the calibration has none, or was made of other values.
        """
        self.require(fqn)
        if fingerprint(w_NK.contiguous()) != self.fingerprints[fqn]:
            raise CalibrationError(
                f"{fqn}: its values are not those that were calibrated; calibrate the model anew"
            )
        return self.packed[fqn]

    def require(self, fqn: str) -> None:
        """Check that there are codes for a linear.

        Raises:
            CalibrationError: there are none.
        """
        if fqn not in self.packed:
            raise CalibrationError(
                f"the calibration has no codes for {fqn}: it was made with "
                f"select={self.about.get('select', '')!r}"
            )

    def digest(self) -> str:
        """Return a hash of the codes and of the weights that they stand for."""
        parts = [
            str(self.format),
            str(self.quantizer),
            *sorted(map(str, self.fingerprints.items())),
        ]
        for fqn, each in sorted(self.packed.items()):
            codes = (fingerprint(each.qdata), fingerprint(each.scale.view(torch.uint8)))
            parts.append(f"{fqn} {codes}")
        parts += [f"{fqn} {fingerprint(each)}" for fqn, each in sorted(self.smooth.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            CalibrationError: it cannot be written.
        """
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        for fqn, each in self.packed.items():
            tensors[f"{fqn}.qdata"] = each.qdata.contiguous()
            tensors[f"{fqn}.scale"] = each.scale.view(torch.uint8).contiguous()
            if each.per_tensor_scale is not None:
                tensors[f"{fqn}.per_tensor_scale"] = each.per_tensor_scale.clone()
        tensors |= {f"{fqn}.smooth": each.clone() for fqn, each in self.smooth.items()}
        facts = {
            "format": str(self.format),
            "quantizer": str(self.quantizer),
            "shapes": {fqn: each.shape for fqn, each in self.packed.items()},
            "fingerprints": self.fingerprints,
            "about": self.about,
        }
        try:
            with written_whole(path) as draft:
                save_file(tensors, draft, metadata={"kind": _KIND, "facts": json.dumps(facts)})
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"cannot write {path}: {error}") from None

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            CalibrationError: it cannot be read, or is no such file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("kind") != _KIND:
                    raise CalibrationError(f"{path} is no calibration of fp4graph")
                facts = json.loads(metadata["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise CalibrationError(f"cannot read the calibration {path}: {error}") from None
        format = get_format(facts["format"])
        packed = {
            fqn: PackedWeight(
                tensors[f"{fqn}.qdata"],
                tensors[f"{fqn}.scale"].view(format.scale_codec.dtype),
                tensors.get(f"{fqn}.per_tensor_scale"),
                (rows, columns),
                format,
            )
            for fqn, (rows, columns) in facts["shapes"].items()
        }
        smooth = {fqn: tensors[f"{fqn}.smooth"] for fqn in packed if f"{fqn}.smooth" in tensors}
        return cls(
            format,
            Quantizer.parse(facts["quantizer"], format),
            packed,
            smooth,
            facts["fingerprints"],
            facts["about"],
        )
