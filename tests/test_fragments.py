"""Models that Dynamo sees in pieces: graph breaks, layers compiled alone."""

from __future__ import annotations

import copy

import pytest
import torch
from support.closer import relative_l2
from support.models import dequantised, tiny, tokens
from support.nets import Block, Net, net
from torch import Tensor, nn

import fp4graph
from fp4graph.errors import SelectorError


def compiled(model: nn.Module, select: object = "all", **options: object) -> nn.Module:
    backend = fp4graph.backend(select, **{"inner": "eager", **options})  # type: ignore[arg-type]
    return torch.compile(model, backend=backend)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def test_a_mapping_entry_that_matches_nothing_raises() -> None:
    model = tiny("llama")
    for given in (None, model):
        torch._dynamo.reset()
        backend = fp4graph.backend({"all": "nvfp4", "q,blocks>99": None}, model=given)
        with pytest.raises(SelectorError, match="`blocks>99` matches nothing"):
            logits(torch.compile(model, backend=backend))


def test_a_term_may_match_in_another_fragment() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(32, 32)}) for _ in "ab")

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0]["q_proj"](x)
            torch._dynamo.graph_break()
            return self.layers[1]["q_proj"](x)

    model, x = Broken(), torch.ones(2, 32)
    backend = fp4graph.backend("q,blocks=1", inner="eager")
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
        assert backend.report.graphs == 2
        assert [row.path for row in backend.report.selected] == ["layers.1.q_proj"]
        torch._dynamo.reset()
        wrong = torch.compile(model, backend=fp4graph.backend("q | blocks=7", inner="eager"))
        for _ in range(2):  # and the error stays
            with pytest.raises(SelectorError, match=r"`blocks=7` matches nothing: .*blocks 0\.\.1"):
                wrong(x)


def test_layers_compiled_alone_need_the_model() -> None:
    model = tiny("llama")
    expected = logits(compiled(model, "blocks=-1"))
    torch._dynamo.reset()
    backend = fp4graph.backend("blocks=-1", inner="eager", model=model)
    whole = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.compile(backend=backend)
    assert relative_l2(logits(model), expected) < 1e-6
    assert [row.block for row in backend.report.selected] == [1] * 7
    torch._dynamo.reset()
    blind = fp4graph.backend("blocks=-1", inner="eager")
    for layer in whole.model.layers:
        layer.compile(backend=blind)
    with pytest.raises(SelectorError, match="pass model= to backend"):
        logits(whole)


def test_a_graph_break_keeps_every_linear() -> None:
    model = tiny("opt")  # its static cache path breaks the graph; a hook does so everywhere
    model.model.decoder.layers[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    backend = fp4graph.backend("all", inner="eager", model=model)
    out = logits(torch.compile(model, backend=backend))
    assert len(backend.report.selected) == 12
    assert relative_l2(out, logits(dequantised(model, backend.report))) < 1e-5


def test_a_negative_block_in_a_fragment_is_refused_without_the_model() -> None:
    model = tiny("opt")
    model.model.decoder.layers[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(SelectorError, match="pass model= to backend"):
        logits(compiled(model, "blocks=-1"))
    torch._dynamo.reset()
    backend = fp4graph.backend("blocks=-1", inner="eager", model=model)
    logits(torch.compile(model, backend=backend))
    assert {row.block for row in backend.report.selected} == {1}


def test_explain_sees_a_model_whole_that_graph_breaks_split() -> None:
    model = tiny("opt")
    model.model.decoder.layers[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    report = fp4graph.explain(model, tokens(), select="blocks=-1", use_cache=False)
    assert [row.block for row in report.selected] == [1] * 6
    assert len(report) == 13


class Broken(Block):
    """Breaks the graph between its two linears' modules."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(x)
        torch._dynamo.graph_break()
        return x + self.mlp(x)


class BrokenNet(Net):
    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.layers = nn.ModuleList(Broken(32) for _ in range(blocks))


@pytest.mark.parametrize("select, count", [("all", 12), ("down,blocks=1", 1), ("attn,blocks>1", 2)])
def test_graph_breaks_leave_paths_whole_for_the_module_that_is_called(
    select: str, count: int
) -> None:
    model, x = net(cls=BrokenNet), torch.randn(2, 32)
    backend = fp4graph.backend(select, inner="eager")
    with torch.no_grad():
        out = torch.compile(model, backend=backend)(x)
    picked = [row.path for row in backend.report.selected]
    assert len(picked) == count
    assert all(path.startswith("layers.") for path in picked)
    twin = copy.deepcopy(model)
    for path in picked:
        linear = twin.get_submodule(path)
        linear.weight.copy_(fp4graph.quantize(linear.weight).dequantize())
    assert relative_l2(out, twin(x)) < 2e-6


def test_what_is_in_no_graph_has_a_row_in_explain() -> None:
    model = net()
    model.layers[1].mlp.forward = torch._dynamo.disable(model.layers[1].mlp.forward)
    report = fp4graph.explain(model, torch.randn(2, 32), select="blocks=1")
    reasons = {row.path: row.reason for row in report if row.path.startswith("layers.1.mlp")}
    assert set(reasons) == {"layers.1.mlp.up_proj", "layers.1.mlp.down_proj"}
    assert all(
        "refused: layers.1.mlp is kept from compilation" in each for each in reasons.values()
    )


class Shared(nn.Module):
    """Two blocks that share a weight, the second one in a graph of its own."""

    def __init__(self, *, split: bool) -> None:
        super().__init__()
        self.layers = net(2).layers
        self.layers[1].mlp.up_proj.weight = self.layers[0].mlp.up_proj.weight
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if self.split:
                torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("known", [False, True])
@torch.no_grad()
def test_a_weight_of_two_blocks_is_each_block_s_own(split: bool, known: bool) -> None:
    model = Shared(split=split)
    backend = fp4graph.backend("blocks=0", inner="eager", model=model if known else None)
    torch.compile(model, backend=backend)(torch.randn(3, 32))
    assert {row.path for row in backend.report.selected} == {
        f"layers.0.{name}"
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert "layers.1.mlp.up_proj" in {row.path for row in backend.report}
