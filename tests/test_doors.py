"""Doors: what an import and a help text cost, models before they are loaded, names that are not."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from support.models import byte_tokenizer, tiny, tokens
from torch import nn

import fp4graph
from fp4graph import ModelError, models
from fp4graph.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

COMMANDS = sorted(main.commands)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def imported(code: str) -> set[str]:
    said = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(said.stdout.split())


def test_importing_fp4graph_imports_no_torch() -> None:
    found = imported("import fp4graph; fp4graph.__version__, dir(fp4graph)")
    assert "fp4graph" in found
    assert not found & {"torch", "transformers", "matplotlib", "scipy", "numpy"}


def test_help_imports_no_torch() -> None:
    code = (
        "from fp4graph.cli import main\n"
        f"for name in {COMMANDS!r}:\n"
        "    main([name, '--help'], standalone_mode=False)"
    )
    assert not imported(code) & {"torch", "transformers", "matplotlib", "scipy", "numpy"}


def test_every_public_name_is_there() -> None:
    for name in fp4graph.__all__:
        assert getattr(fp4graph, name) is not None
    assert callable(fp4graph.backend)
    assert callable(fp4graph.explain)
    assert callable(fp4graph.study.ablate)
    assert set(fp4graph.__all__) <= set(dir(fp4graph))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_whole(command: str) -> None:
    summary = next(
        line for line in run("--help").stdout.splitlines() if line.split()[:1] == [command]
    )
    assert summary.rstrip().endswith(".")
    assert "..." not in summary
    assert run(command, "--help").exit_code == 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("smolm2-135m", "did you mean 'smollm2-135m'"),
        ("qwen2.5-3b-randon", "did you mean 'qwen2.5-3b-random'"),
        ("qwen2.5-99b-random", "no random model"),
        ("/nowhere/at/all", "there is no folder '/nowhere/at/all'"),
        ("./gone", "there is no folder './gone'"),
        ("gone.gguf", "there is no file"),
    ],
)
def test_names_of_models_that_are_none(name: str, words: str) -> None:
    for find in (models.load, models.outline):
        with pytest.raises(ModelError, match=words):
            find(name)


def test_a_folder_within_one_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="there is no folder 'models/gone'"):
        models.load("models/gone")


def test_a_folder_without_a_tokenizer(tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        if "tokenizer" not in file.name and "special" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    loaded = models.load(str(tmp_path))
    assert loaded.tokenizer is None
    assert loaded.no_tokenizer
    assert not loaded.is_random
    with pytest.raises(ModelError, match=r"no tokenizer that works .*\.save_pretrained"):
        loaded.text_tokenizer()
    result = run("ablate", str(tmp_path), "--by", "role", "--tokens", "64", "--seq-len", "32")
    assert result.exit_code == 2
    assert "has no tokenizer that works" in result.stderr
    assert "has no tokenizer that works" in run("inspect", str(tmp_path)).stderr
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert run("inspect", str(tmp_path)).exit_code == 0, "a configuration is enough"


def test_inspect_says_what_a_folder_lacks(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(tmp_path)
    assert run("inspect", str(tmp_path)).exit_code == 0
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    for _ in range(2):
        result = run("inspect", str(tmp_path))
        assert result.exit_code == 2
        assert f"{shard.name} is missing or not whole" in result.stderr
        shard.unlink(missing_ok=True)


def test_too_little_memory_is_said_before_loading(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr("fp4graph.models.read_checkpoint", never)
    size = sum(each.numel() for each in tiny("llama").parameters())
    monkeypatch.setattr("fp4graph.skeleton.available", lambda device: size * 3)
    with pytest.raises(ModelError, match=r"in float32, and .* are free on cpu; .*--dtype bfloat16"):
        models.load(str(tiny_folder))
    monkeypatch.setattr("fp4graph.skeleton.available", lambda device: size)
    with pytest.raises(ModelError, match="more memory is needed, or --stream"):
        models.load(str(tiny_folder))
    with pytest.raises(ModelError, match=r"qwen2\.5-7b-random: its 7616 million parameters"):
        models.load("qwen2.5-7b-random")


def test_a_limit_of_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    from fp4graph.memory import available

    free = available(torch.device("cpu"))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1, 1))
    assert free > 0 == available(torch.device("cpu"))


def test_inspect_reads_no_weight(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 4, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("inspect", str(tmp_path), "--select", '{"all": "nvfp4", "v": null}', "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert sum(row["selected"] for row in rows) == 4 * 6
    assert {row["kernel"] for row in rows if row["selected"]} == {"cpu"}
    table = run("inspect", str(tmp_path), "--mix", str(tmp_path / "none.toml"))
    assert "cannot read the mix" in table.stderr


def test_a_model_on_the_meta_device_is_explained() -> None:
    model = tiny("llama").to("meta")
    report = fp4graph.explain(model, tokens(8), select="attn", use_cache=False)
    assert len(report.selected) == 8
    assert not report.refused
    gpu = fp4graph.explain(model, tokens(8), select="attn", device="cuda:sm_90", use_cache=False)
    assert len(gpu.selected) == 8
    assert all(row.layout for row in gpu.selected)


def test_what_a_call_on_meta_leaves_out_has_the_usual_reason() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    report = fp4graph.explain(Partly().to("meta"), torch.zeros(2, 64), select="path:*")
    assert "this call did not reach it" in report.rows_by_path["idle"].reason


def test_code_that_looks_at_values_is_loaded_after_all(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fp4graph.explain, []

    def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(next(model.parameters()).device.type)
        if calls[-1] == "meta":
            raise RuntimeError("data-dependent")
        return real(model, *args, **kwargs)

    monkeypatch.setattr(fp4graph, "explain", explain)
    result = run("inspect", str(tiny_folder))
    assert result.exit_code == 0
    assert "it cannot be traced without weights (data-dependent)" in result.stderr
    assert calls == ["meta", "cpu"]


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_class_that_dynamo_has_skipped_is_traced_again() -> None:
    x = torch.randn(3, 64)
    for empty in (nn.Sequential(), Nothing()):
        torch.compile(empty, backend="eager")(x)  # Dynamo skips their code for good
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    assert len(fp4graph.explain(model, x, select="path:*").selected) == 2
    for empty in (nn.Sequential(), Nothing()):
        torch.compile(empty, backend="eager")(x)
    for owner in (None, model):
        backend = fp4graph.backend("path:*", inner="eager", model=owner)
        torch.compile(model, backend=backend)(x)
        assert len(backend.report.selected) == 2


def test_what_a_user_disabled_stays_disabled() -> None:
    class Apart(nn.Linear):
        @torch.compiler.disable(recursive=False)
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.apart = nn.Linear(64, 64), Apart(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.apart(self.inside(x) + 1)

    model = Model().requires_grad_(False)
    backend = fp4graph.backend("path:*inside", inner="eager", model=model)
    torch.compile(model, backend=backend)(torch.randn(3, 64))
    assert [row.path for row in backend.report.selected] == ["inside"]


def test_a_report_before_the_first_call_says_so() -> None:
    backend = fp4graph.backend("all", inner="eager")
    assert backend.report.summary.startswith("nothing was compiled yet")
    assert "nothing was compiled yet" in repr(backend)
    model = tiny("llama").requires_grad_(False)
    torch.compile(model, backend=backend)(tokens(8), use_cache=False)
    assert repr(backend).startswith("<fp4graph backend: all; 14 of 15 linears in FP4")
    frame = backend.report.to_pandas()
    assert len(frame) == len(backend.report.to_dict()["path"]) == 15
    assert "<table>" in backend.report._repr_html_()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["ablate", "m", "--select", "q", "--format", "MXFP4"], "did you mean 'mxfp4'"),
        (["ablate", "m", "--select", "q", "--quantizer", "gptq"], "made, --calibration FILE"),
        (["sensitivity", "m", "--quantizer", "gptq"], "is not scored"),
        (["sensitivity", "m", "--activations", "W4A4"], "'same' (W4A4)"),
        (["calibrate", "m", "--out", "y.pt"], "ends with .safetensors"),
        (
            ["calibrate", "m", "--select", "q", "--mix", "a.toml", "--out", "a.safetensors"],
            "just one",
        ),
        (["outliers", "m", "--picture", "x.jpg"], "ends with .png, .svg, .pdf"),
        (["latency", "m"], "--select SELECTOR or --mix FILE"),
        (["latency", "m", "--select", "q", "--name", "a", "--name", "b"], "2 times --name"),
        (["show", "nowhere"], "there are no results in nowhere"),
        (["ablate", "m", "--select", '{"q": "nvfp4"'], "a mapping is JSON"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_looked_for(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if words in line]
    assert line.startswith("fp4graph: ")
    assert list(tmp_path.iterdir()) == []


def test_no_option_is_suggested_that_is_not_near() -> None:
    result = run("ablate", "m", "--kernel", "x")
    assert result.exit_code == 2
    assert "Did you mean" not in result.stderr
    assert "Did you mean '--tokens'" in run("ablate", "m", "--token", "3").stderr
