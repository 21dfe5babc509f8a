"""Models that Dynamo sees in pieces: graph breaks, layers compiled alone."""

from __future__ import annotations

import copy

import pytest
import torch
from support.closer import relative_l2
from support.models import dequantised, tiny, tokens
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
