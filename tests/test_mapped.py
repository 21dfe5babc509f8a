"""Tensors and models that lie in mapped files."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from support.models import tiny, tokens

from fp4graph import ModelError, OptionError, StudyError, models, study
from fp4graph.cli import main
from fp4graph.mapped import MappedFile, is_mapped
from fp4graph.memory import give_back_memory
from fp4graph.study.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

WAYS = [
    torch.arange(24.0).view(2, 3, 4),
    torch.arange(24.0).view(4, 6).T,
    torch.arange(24.0).view(4, 6)[1:3, ::2],
    torch.arange(6.0)[None, :, None].expand(2, 6, 3),
    torch.tensor(3.5, dtype=torch.bfloat16),
    torch.arange(5) > 2,
    torch.arange(6.0).to(torch.complex64),
    torch.empty(0, 4),
]


def anonymous() -> int:
    """Return how much memory this process has that no file backs, bytes."""
    gc.collect()
    give_back_memory()  # what was freed is to be counted no more
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith("RssAnon"))
    return int(found) * 1024


def test_values_and_order_are_kept(tmp_path: Path) -> None:
    file = MappedFile(tmp_path / "new")
    kept = [file.keep(each) for each in WAYS]
    for one, other in zip(kept, WAYS, strict=True):
        assert torch.equal(one, other)
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert is_mapped(one) or not one.numel()
        assert not is_mapped(other)
    assert not list((tmp_path / "new").iterdir()), "the file has no name"
    kept[0] += 1
    del file
    assert torch.equal(kept[0], WAYS[0] + 1)


def test_large_ones_and_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp4graph.mapped._PIECE", 1 << 16)
    file, handles = MappedFile(tmp_path), len(os.listdir("/proc/self/fd"))
    values = [torch.full((size,), float(size)) for size in (1, 10_000, 30_000, *range(1, 3000))]
    kept = [file.keep(each) for each in values]
    assert all(map(torch.equal, kept, values))
    assert len(os.listdir("/proc/self/fd")) - handles < 300


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MappedFile(tmp_path)
    with pytest.raises(StudyError, match=r"no room in .*: 1000000.0 GB are needed"):
        file.room(10**15)

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StudyError, match=rf"cannot keep values in {tmp_path}: .*No space left"):
        file.keep(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3"])
def test_the_same_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path)
    usual = models.load(str(tmp_path), dtype)
    streamed = models.load(str(tmp_path), dtype, stream=True)
    assert streamed.revision() == usual.revision()
    assert all(map(is_mapped, streamed.model.parameters()))
    for (name, one), (other_name, other) in zip(
        streamed.model.state_dict().items(), usual.model.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    with torch.no_grad():
        both = [each.model(tokens()).logits for each in (usual, streamed)]
    assert torch.equal(*both)
    streamed.model.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    assert models.load(str(tmp_path / "again"), dtype).revision() == usual.revision()


def test_its_weights_take_no_memory(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=512
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    size = 2 * model.num_parameters() * torch.bfloat16.itemsize  # in float32
    model.save_pretrained(tmp_path)
    del model
    models.load(str(tmp_path), stream=True)
    before = anonymous()
    loaded = models.load(str(tmp_path), stream=True)
    assert anonymous() - before < size / 5
    del loaded
    loaded = models.load(str(tmp_path))
    assert not any(map(is_mapped, loaded.model.parameters())), "which are of another dtype"
    assert not loaded.streamed


def test_faults_are_said(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(OptionError, match="device=cuda: what is streamed runs on the CPU"):
        models.load(str(tiny_folder), device="cuda", stream=True)
    with pytest.raises(OptionError, match="has no weights in a file"):
        models.load("qwen2.5-0.5b-random", stream=True)
    model = tiny("llama")
    del model.model.layers[1].mlp.up_proj
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks model.layers.1.mlp.up_proj.weight"):
        models.load(str(tmp_path), torch.bfloat16, stream=True)
    config = tiny("llama").config
    config.intermediate_size //= 2
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"another shape for model.layers.0.mlp.down_proj.weight"):
        models.load(str(tmp_path), torch.bfloat16, stream=True)


def test_a_copy_that_has_no_room(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert models.load(str(tiny_folder), stream=True).streamed, "its files have that dtype"
    with pytest.raises(StudyError, match=r"cannot keep values in .*No space left"):
        models.load(str(tiny_folder), torch.bfloat16, stream=True)


OPTIONS = "--corpus", "pydoc", "--tokens", "128", "--seq-len", "32", "--json"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("ablate", "--plan", "grid", "--direction", "both", "--activations", "none,same"),
        ("ablate", "--plan", "grid", "--dtype", "bfloat16"),
        ("sensitivity", "--activations", "none,same"),
        ("outliers",),
    ],
    ids=lambda each: "-".join(each[::3]),
)
@pytest.mark.parametrize("family", ["mixtral"])
def test_studies_give_the_same(
    command: tuple[str, ...], family: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    def rows(*more: str) -> str:
        name, *options = command
        out = ("--out", str(tmp_path / "-".join(more))) if name == "ablate" else ()
        call: list[Any] = [name, str(folder_of(family)), *options, *OPTIONS, *out, *more]
        result = CliRunner().invoke(main, call)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert rows("--stream") == rows()


def test_a_streamed_trial_says_how_far_it_is(tiny_folder: Path) -> None:
    class Told(Progress):
        def __init__(self) -> None:
            self.parts: list[str] = []

        def within(self, what: str) -> None:
            self.parts.append(what)

    told = Told()
    loaded = models.load(str(tiny_folder), stream=True)
    study.ablate(loaded, tokens(16, batch=2), "blocks=0", progress=told)
    assert {each.partition(",")[0] for each in told.parts} == {"part 1 of 3", "part 2 of 3"}
