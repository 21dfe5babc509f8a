"""What fp4graph uses of torch that is private: each name is there, with the shape that is used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.nets import net
from torch import nn

import fp4graph
from fp4graph import private
from fp4graph.errors import TorchVersionError

X = torch.randn(2, 32)
PACKAGE = Path(fp4graph.__file__).parent


@pytest.mark.parametrize("path", private.NEEDED)
def test_every_name_is_there(path: str) -> None:
    assert private._resolve(path) is not None


def test_a_name_that_is_gone_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(private.NEEDED, "torch._dynamo.gone.name", "a thing")
    with pytest.raises(TorchVersionError, match=r"no torch\._dynamo\.gone\.name, needed for: a th"):
        private._resolve("torch._dynamo.gone.name")


def test_no_other_file_asks_torch_for_what_is_private() -> None:
    """But for types of ops, which are public in all but their module."""
    word = re.compile(r"torch\._(?!nested)\w+|sys\._getframe")
    known = {"torch._ops", "torch._scaled_mm", "torch._C"}
    for file in PACKAGE.rglob("*.py"):
        if file.name == "private.py":
            continue
        code = re.sub(
            r'""".*?"""|#.*|f?"[^"\n]*"', "", file.read_text(encoding="utf-8"), flags=re.S
        )
        found = set(word.findall(code)) - known - {"torch._dynamo"}
        assert not found, file
        assert not re.search(r"torch\._dynamo\.(?!config\.|reset|config\b)", code), file
        assert "torch._C." not in code, file


def test_dynamo_s_graphs_have_what_is_read_of_them() -> None:
    seen = []

    def look(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        seen.append(len(placeholders))
        assert hasattr(gm, "_param_name_to_source")
        assert isinstance(gm.meta["dynamo_compile_id"].frame_id, int)
        for node, value in zip(placeholders, inputs, strict=True):
            assert "example_value" in node.meta
            if isinstance(value, nn.Parameter):
                argument = node.meta["grapharg"]
                assert argument.example is value
                assert argument.source.name.startswith("L['self']")
        linears = [node for node in gm.graph.nodes if node.target is nn.functional.linear]
        assert linears
        for node in linears:
            path, kind = list(node.meta["nn_module_stack"].values())[-1]
            assert "layers" in path
            assert kind is nn.Linear
        frame = private.required_call()
        assert frame is not None
        assert set(private.CALL_LOCALS) <= set(frame.f_locals)
        assert hasattr(frame.f_locals["self"], "enter_exit_hooks")
        assert private.innermost_backend(frame.f_locals["self"].callback) is not None
        return gm.forward

    with torch.no_grad():
        torch.compile(net(), backend=look)(X)
    assert seen


def test_a_buffer_has_its_name_in_its_placeholder() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.ones(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.shift

    seen = []

    def look(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        seen.extend(str(node.target) for node in gm.graph.nodes if node.op == "placeholder")
        return gm.forward

    torch.compile(Shifted(), backend=look)(X)
    assert any("_buffers_" in name for name in seen)


def test_a_call_that_has_changed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    call = torch.compile(net(), backend=fp4graph.backend("all", inner="eager"))
    monkeypatch.setattr(private, "CALL_LOCALS", (*private.CALL_LOCALS, "another"))
    with torch.no_grad(), pytest.raises(Exception, match="a compiled call has no `another`"):
        call(X)


def test_a_call_that_is_not_found_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    call = torch.compile(net(), backend=fp4graph.backend("all", inner="eager"))
    monkeypatch.setattr(private, "running_call", lambda: None)
    with torch.no_grad(), pytest.raises(TorchVersionError, match="is not found"):
        call(X)


def test_stances_and_settings() -> None:
    assert private.stance() == "default"
    with torch.compiler.set_stance("force_eager"):
        assert private.stance() == "force_eager"
    revert = private.settings_patcher(fail_on_recompile_limit_hit=True)()
    assert torch._dynamo.config.fail_on_recompile_limit_hit
    revert()
    assert not torch._dynamo.config.fail_on_recompile_limit_hit
    assert isinstance(private.setting("recompile_limit").default, int)
