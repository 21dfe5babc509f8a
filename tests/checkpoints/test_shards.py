"""Folders that are not what they say."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fp4graph import ModelError
from fp4graph.checkpoints.shards import INDEX, Shards, read_json

if TYPE_CHECKING:
    from pathlib import Path


def folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    for number in (1, 2):
        tensors = {f"w{number}": torch.arange(12.0).reshape(3, 4) + number}
        save_file(tensors, path / f"model-{number}.safetensors")
    index(path, {f"w{number}": f"model-{number}.safetensors" for number in (1, 2)})
    return path


def index(path: Path, mapping: Any) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


def test_reads_what_is_there(tmp_path: Path) -> None:
    shards = Shards(folder(tmp_path / "m"))
    assert "w1" in shards
    assert shards.shape("w2") == (3, 4)
    assert torch.equal(shards.get("w2"), torch.arange(12.0).reshape(3, 4) + 2)
    assert [len(names) for names in shards.by_file().values()] == [1, 1]
    with pytest.raises(ModelError, match="no tensor w3"):
        shards.get("w3")


@pytest.mark.parametrize(
    "mapping, problem",
    [
        ({"w1": "../outside.safetensors"}, "no file of the folder"),
        ({"w1": "/etc/passwd"}, "no file of the folder"),
        ({"w1": "sub/model.safetensors"}, "no file of the folder"),
        ({"w1": ".hidden.safetensors"}, "no file of the folder"),
        ({"w1": "model-1.bin"}, "no file of the folder"),
        ({"w1": "model-3.safetensors"}, "missing or not whole"),
        ({"w1": "model-1.safetensors", "w9": "model-1.safetensors"}, "no file has w9"),
        ({"w1": 3}, "cannot be read"),
        ([1], "cannot be read"),
    ],
)
def test_an_index_that_lies(mapping: Any, problem: str, tmp_path: Path) -> None:
    save_file({"w1": torch.zeros(2)}, tmp_path / "outside.safetensors")
    path = folder(tmp_path / "m")
    index(path, mapping)
    with pytest.raises(ModelError, match=problem):
        Shards(path)


def test_other_kinds_of_weights_are_not_read(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        Shards(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match=r"w stands in a\.safetensors and b\.safetensors"):
        Shards(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ModelError, match="no JSON object"):
        read_json(tmp_path / "config.json")


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_broken_files_are_errors_or_read(data: st.DataObject, tmp_path: Path) -> None:
    """Cut, with bytes changed, or with another length of the head."""
    path = tmp_path / "model.safetensors"
    for old in tmp_path.iterdir():
        old.unlink()
    save_file({"w": torch.arange(64.0), "v": torch.zeros(3, 4, dtype=torch.uint8)}, path)
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "head", "json"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "flip":
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    elif kind == "head":
        content[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    else:
        shape = data.draw(st.lists(st.integers(-1, 2**40), max_size=3))
        head = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}).encode()
        content = bytearray(struct.pack("<Q", len(head)) + head + bytes(16))
    path.write_bytes(bytes(content))
    try:
        shards = Shards(tmp_path)
        for name in shards.files:
            assert shards.get(name).shape == shards.shape(name)
    except ModelError:
        pass
