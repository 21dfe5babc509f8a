"""Codes found with data, kept in one file: what `backend(calibration=...)` takes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
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
        quantizers: how each one's codes were found.
        packed: the weights, each in its own format.
        smooth: what the columns of some of them were multiplied by, float32 [K] each.
        fingerprints: hash of each dense weight, as [N, K], that was packed.
        about: further facts for the reader: model, text, samples, versions.
    """

    quantizers: dict[str, Quantizer]
    packed: dict[str, PackedWeight]
    smooth: dict[str, Tensor]
    fingerprints: dict[str, int]
    about: dict[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle scales as bytes: pickle cannot read float8 back."""
        packed = {
            fqn: replace(each, scale=each.scale.view(torch.uint8))
            for fqn, each in self.packed.items()
        }
        return {**self.__dict__, "packed": packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for fqn, each in state["packed"].items():
            scale = each.scale.view(each.format.scale_codec.dtype)
            state["packed"][fqn] = replace(each, scale=scale)
        self.__dict__.update(state)

    @property
    def ways(self) -> tuple[tuple[BlockFormat, Quantizer], ...]:
        """Every format with every quantizer that it was calibrated with."""
        found = ((each.format, self.quantizers[fqn]) for fqn, each in self.packed.items())
        return tuple(dict.fromkeys(found))

    def transform(self, fqn: str) -> Transform:
        """Return what a weight was multiplied by before it was rounded."""
        return Transform(self.quantizers[fqn].rotation, self.smooth.get(fqn))

    def dequantize(self, fqn: str) -> Tensor:
        """Return the weight that a linear's codes stand for, for inputs as they are; [N, K]."""
        return self.transform(fqn).undo(self.packed[fqn].dequantize())

    def quantizer_of(self, format: BlockFormat) -> Quantizer:
        """Return the one quantizer that a format was calibrated with.

        Raises:
            CalibrationError: there is none, or there are several.
        """
        found = [quantizer for each, quantizer in self.ways if each == format]
        if len(found) == 1:
            return found[0]
        if found:
            names = " and ".join(map(str, found))
            raise CalibrationError(f"the calibration has {format} by {names}: say quantizer=")
        names = " and ".join(dict.fromkeys(str(each) for each, _ in self.ways)) or "nothing"
        raise CalibrationError(
            f"the calibration is for {names}, and {format} is asked for: say format="
        )

    def get(
        self, fqn: str, w_NK: Tensor, format: BlockFormat, quantizer: Quantizer
    ) -> PackedWeight:
        """Return the packed form of a weight.

        Raises:
            CalibrationError: the calibration has none, or was made of other values.
        """
        self.require(fqn, format, quantizer)
        if fingerprint(w_NK.contiguous()) != self.fingerprints[fqn]:
            raise CalibrationError(
                f"{fqn}: its values are not those that were calibrated; calibrate the model anew"
            )
        return self.packed[fqn]

    def require(self, fqn: str, format: BlockFormat, quantizer: Quantizer) -> None:
        """Check that there are codes for a linear, in a format and by a quantizer.

        Raises:
            CalibrationError: there are none.
        """
        if fqn not in self.packed:
            raise CalibrationError(
                f"the calibration has no codes for {fqn}: it was made with "
                f"select={self.about.get('select', '')!r}"
            )
        found = self.packed[fqn].format, self.quantizers[fqn]
        if found != (format, quantizer):
            raise CalibrationError(
                f"the calibration has {fqn} in {found[0]} by {found[1]}, and {format} by "
                f"{quantizer} is asked for"
            )

    def digest(self) -> str:
        """Return a hash of the codes and of the weights that they stand for."""
        parts = [
            *(str(each) for way in self.ways for each in way),
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
            "formats": {fqn: str(each.format) for fqn, each in self.packed.items()},
            "quantizers": {fqn: str(each) for fqn, each in self.quantizers.items()},
            "shapes": {fqn: each.shape for fqn, each in self.packed.items()},
            "fingerprints": self.fingerprints,
            "about": self.about,
        }
        try:
            with written_whole(path) as draft:
                save_file(tensors, draft, metadata={"kind": _KIND, "facts": json.dumps(facts)})
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"cannot write {path}: {error}") from None

    @staticmethod
    def facts(path: Path | str) -> dict[str, Any]:
        """Return what a file says of itself, without its codes.

        Raises:
            CalibrationError: it cannot be read, or is no such file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            if metadata.get("kind") != _KIND:
                raise CalibrationError(f"{path} is no calibration of fp4graph")
            facts: dict[str, Any] = json.loads(metadata["facts"])
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise CalibrationError(f"cannot read the calibration {path}: {error}") from None
        if "formats" not in facts:
            raise CalibrationError(f"{path} is of an older fp4graph: calibrate anew")
        return facts

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            CalibrationError: it cannot be read, or is no such file.
        """
        facts = cls.facts(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"cannot read the calibration {path}: {error}") from None
        formats = {fqn: get_format(name) for fqn, name in facts["formats"].items()}
        packed = {
            fqn: PackedWeight(
                tensors[f"{fqn}.qdata"],
                tensors[f"{fqn}.scale"].view(formats[fqn].scale_codec.dtype),
                tensors.get(f"{fqn}.per_tensor_scale"),
                (rows, columns),
                formats[fqn],
            )
            for fqn, (rows, columns) in facts["shapes"].items()
        }
        smooth = {fqn: tensors[f"{fqn}.smooth"] for fqn in packed if f"{fqn}.smooth" in tensors}
        return cls(
            {fqn: Quantizer.parse(name, formats[fqn]) for fqn, name in facts["quantizers"].items()},
            packed,
            smooth,
            facts["fingerprints"],
            facts["about"],
        )
