"""What commands wrote beside the trials: JSON lines by their keys, heads of calibrations."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fp4graph import StudyError
from fp4graph.errors import CalibrationError
from fp4graph.files import read_lines
from fp4graph.quantizers import Calibration

if TYPE_CHECKING:
    from pathlib import Path

    Rows = list[dict[str, Any]]

_KEYS = {
    "sensitivity": "kl_element",
    "outliers": "outlier_channels",
    "latency": "ttft_s",
    "policy": "predicted_kl",
}
_DRAWN_FROM_TRIALS = ("ablation.jsonl", "runs.jsonl")


@dataclass
class Beside:
    """Rows of other commands, as `--json` prints them, and what calibrations say of themselves."""

    sensitivity: Rows = field(default_factory=list)
    outliers: Rows = field(default_factory=list)
    latency: Rows = field(default_factory=list)
    policy: Rows = field(default_factory=list)
    calibrations: Rows = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())


def read_beside(folder: Path) -> Beside:
    """Read the .jsonl files and calibrations of a folder; what is neither is left out.

    Raises:
        StudyError: a file cannot be read; a line is no JSON object.
    """
    found = Beside()
    for file in sorted(folder.glob("*.jsonl")):
        if file.name in _DRAWN_FROM_TRIALS:
            continue
        for number, line in _lines(file):
            row = _object(file, number, line)
            what = _KEYS.items()
            kinds = [kind for kind, key in what if key in row or key in row.get("input", {})]
            for kind in kinds[:1]:
                getattr(found, kind).append(row)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            found.calibrations.append({"file": file.name, **_said(Calibration.facts(file))})
        except CalibrationError:
            continue  # a checkpoint's
    return found


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        return read_lines(file)
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"cannot read {file}: {error}") from None


def _object(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=lambda _: None)  # NaN and infinities
    except json.JSONDecodeError as error:
        raise StudyError(f"{file}, line {number}: {error}") from None
    if not isinstance(row, dict):
        raise StudyError(f"{file}, line {number}: expected a JSON object")
    return row


def _said(facts: dict[str, Any]) -> dict[str, Any]:
    about = facts["about"]
    errors = list(about.get("output_error", {}).values())
    nearest, found = (fmean(pair[side] for pair in errors) if errors else None for side in (0, 1))
    return {
        "formats": ", ".join(dict.fromkeys(facts["formats"].values())),
        "quantizers": ", ".join(dict.fromkeys(facts["quantizers"].values())),
        "linears": len(facts["formats"]),
        "corpus": about.get("corpus"),
        "samples": about.get("samples"),
        "seq_len": about.get("seq_len"),
        "error_to_nearest": nearest,
        "error_as_found": found,
    }
