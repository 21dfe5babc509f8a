"""A folder of safetensors, read tensor by tensor and never trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from fp4graph.errors import ModelError
from fp4graph.files import read_text

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"


class Shards:
    """The tensors of a checkpoint by name.

    Only safetensors are read, and only files that lie in the folder itself: an index that names
    others is refused.

    Args:
        folder: with one `*.safetensors`, or several and their index.

    Attributes:
        files: each tensor's file.

    Raises:
        ModelError: a file is missing, cut short or no safetensors; the index does not fit them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = {path: _opened(path) for path in _files(folder)}
        self.files: dict[str, Path] = {}
        for path, file in self._open.items():
            for name in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118
                if name in self.files:
                    both = f"{self.files[name].name} and {path.name}"
                    raise ModelError(f"{folder}: {name} stands in {both}")
                self.files[name] = path
        for name in _index(folder):
            if name not in self.files:
                raise ModelError(f"{folder}: no file has {name}, which {INDEX} lists")

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def get(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            ModelError: there is none by that name, or its bytes cannot be read.
        """
        if name not in self.files:
            raise ModelError(f"{self.folder}: there is no tensor {name}")
        try:
            found: Tensor = self._open[self.files[name]].get_tensor(name)  # type: ignore[no-untyped-call]
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise ModelError(f"{self.files[name]}: {name} cannot be read ({error})") from None
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, by its file's head."""
        slice_ = self._open[self.files[name]].get_slice(name)  # type: ignore[no-untyped-call]
        return tuple(slice_.get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as its file's head has it: `F32`, `U8`, `F8_E4M3`."""
        slice_ = self._open[self.files[name]].get_slice(name)  # type: ignore[no-untyped-call]
        return str(slice_.get_dtype())

    def by_file(self) -> dict[Path, list[str]]:
        """Return the names in each file, in order."""
        found: dict[Path, list[str]] = {path: [] for path in self._open}
        for name, path in self.files.items():
            found[path].append(name)
        return {path: sorted(names) for path, names in found.items()}


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path.name} is missing or not whole ({error})") from None


def _files(folder: Path) -> list[Path]:
    listed = set(_index(folder).values())
    for name in sorted(listed):
        inside = Path(name).name == name and not name.startswith(".")
        if not inside or not name.endswith(".safetensors"):
            raise ModelError(f"{folder}: {INDEX} names {name!r}, which is no file of the folder")
    paths = [folder / name for name in sorted(listed)] or sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelError(f"{folder} has no .safetensors: other kinds of weights are not read")
    return paths


def _index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path))["weight_map"]
        if not all(isinstance(each, str) for pair in found.items() for each in pair):
            raise TypeError("weight_map is no mapping from names to files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    return dict(found)


def read_json(path: Path) -> dict[str, object]:
    """Return a JSON file that holds an object.

    Raises:
        ModelError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object")
    return found
