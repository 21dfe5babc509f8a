"""Weights that are used more than once a call, and linears that stand outside the blocks."""

from __future__ import annotations

import math
import types
from typing import TYPE_CHECKING

import pytest
import torch
import transformers as hf
from support.nets import Net, net
from torch import nn
from torch.nn.functional import layer_norm

import fp4graph
from fp4graph import CalibrationError, Scheme
from fp4graph.formats import MXFP4
from fp4graph.models import LoadedModel
from fp4graph.quantizers import Hessian, gptq, output_error
from fp4graph.study.evaluate import Windows
from fp4graph.study.outliers import outliers
from fp4graph.study.sensitivity import Sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

IDS = [
    torch.randint(0, 48, (2, 24), generator=torch.Generator().manual_seed(seed))
    for seed in range(4)
]


class Looped(Net):
    """Runs its blocks twice; the second turn sees other inputs than the first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(3 - 2 * layer_norm(super().forward(x), (32,)))


class Shared(Net):
    """Has each of its blocks twice, under two paths."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.layers = nn.ModuleList([*self.layers, *self.layers])


class Language(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.emb, self.net = nn.Embedding(48, 32), inner
        self.lm_head = nn.Linear(32, 48, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> types.SimpleNamespace:
        return types.SimpleNamespace(logits=self.lm_head(self.net(self.emb(input_ids))))


def language(cls: type[Net], blocks: int = 2) -> nn.Module:
    torch.manual_seed(1)
    return Language(net(blocks, cls=cls)).eval().requires_grad_(False)


def albert() -> nn.Module:
    torch.manual_seed(0)
    config = hf.AlbertConfig(
        vocab_size=48, embedding_size=16, hidden_size=32, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    return hf.AlbertForMaskedLM(config).eval().requires_grad_(False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "looped": lambda: language(Looped),
    "shared": lambda: language(Shared),
    "albert": albert,
}


def hessians(model: nn.Module, names: set[str]) -> dict[str, Hessian]:
    """Return what each weight's linears see in all their calls, by hooks."""
    found: dict[int, Hessian] = {}
    modules = {name: model.get_submodule(name) for name in names}
    hooks = []
    for module in {id(module): module for module in modules.values()}.values():
        hessian = found[id(module)] = Hessian(module.weight.shape[1])
        hooks.append(module.register_forward_pre_hook(lambda _, a, h=hessian: h.add(a[0])))
    with torch.no_grad():
        for ids in IDS:
            model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return {name: found[id(module)] for name, module in modules.items()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("quantizer", ["gptq", pytest.param("learned", marks=pytest.mark.slow)])
def test_all_uses_of_a_weight_count(kind: str, quantizer: str) -> None:
    model = MODELS[kind]()
    batches = [{"input_ids": ids} for ids in IDS]
    found = fp4graph.calibrate(
        model, batches, "all", format="mxfp4", quantizer=quantizer, propagate=False
    )
    assert len(found.packed) >= 6
    for name, hessian in hessians(model, set(found.packed)).items():
        weight = model.get_submodule(name).weight
        nearest = MXFP4.quantize(weight)
        to_nearest, as_found = found.about["output_error"][name]
        mean = hessian.mean
        assert as_found == pytest.approx(
            output_error(weight, found.dequantize(name), mean), rel=1e-3
        )
        assert to_nearest == pytest.approx(
            output_error(weight, nearest.dequantize(), mean), rel=1e-3
        )
        if quantizer == "gptq":
            ours = gptq(weight, mean, nearest)
            assert (ours.qdata == found.packed[name].qdata).double().mean() > 0.99


def test_both_paths_of_a_weight_have_its_codes() -> None:
    model = MODELS["shared"]()
    found = fp4graph.calibrate(model, IDS, format="mxfp4")
    first, again = (f"net.layers.{i}.mlp.up_proj" for i in (0, 2))
    assert torch.equal(found.packed[first].qdata, found.packed[again].qdata)
    with pytest.raises(CalibrationError, match=r"layers\.0.* has the weight of .*layers\.2"):
        fp4graph.calibrate(model, IDS, "blocks=0", format="mxfp4")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_of_all_uses(
    kind: str, streamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = LoadedModel(kind, MODELS[kind](), object(), streamed=streamed)
    windows = Windows(torch.cat(IDS), 1)
    found = Sensitivity(loaded, windows, [Scheme(MXFP4)], samples=64)
    measured = {row.path: row for row in found.rows}
    seen = hessians(loaded.model, set(measured))
    for path, row in measured.items():
        weight = loaded.model.get_submodule(path).weight
        if kind != "shared":  # where a path is one use of two
            error = output_error(weight, MXFP4.quantize(weight).dequantize(), seen[path].mean)
            assert row.output_error == pytest.approx(error, rel=1e-3)
    whole = "is used in several blocks" in caplog.text
    assert whole == (streamed and kind == "looped")
    statistics = outliers(loaded, windows, lambda: None)
    for tag, row in statistics.items():
        uses = {"looped": 2, "shared": 1, "albert": 3}[kind] if tag.block is not None else 1
        assert row.tokens == uses * windows.ids.numel()
        if tag.fqn in seen and kind != "shared":
            assert row.input.max == float(seen[tag.fqn].amax.max())


@pytest.mark.slow
def test_the_score_of_a_looped_linear_is_what_it_costs() -> None:
    model = MODELS["looped"]()
    windows = Windows(torch.cat(IDS), 1)
    name = "net.layers.1.mlp.up_proj"
    loaded = LoadedModel("looped", model, None)
    found = Sensitivity(loaded, windows, [Scheme(MXFP4)], samples=256)
    row = next(row for row in found.rows if row.path == name)
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        dense = model(windows.ids).logits.log_softmax(-1)
        weight.copy_(MXFP4.quantize(weight).dequantize())
        changed = model(windows.ids).logits.log_softmax(-1)
    kl = (dense.exp() * (dense - changed)).sum(-1)[:, :-1].mean()
    assert math.log(row.kl_window / float(kl)) == pytest.approx(0, abs=0.25)


def test_linears_before_the_first_block() -> None:
    torch.manual_seed(0)
    config = hf.OPTConfig(
        vocab_size=96, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    model = hf.OPTForCausalLM(config).eval()
    select = "all | path:*.project_in"
    found = fp4graph.calibrate(model, IDS, select, format="mxfp4", quantizer="gptq+smooth")
    assert "model.decoder.project_in" in found.packed
    backend = fp4graph.backend(select, format="mxfp4", calibration=found, inner="eager")
    with torch.no_grad():
        torch.compile(model, backend=backend)(IDS[0], use_cache=False)
    assert "model.decoder.project_in" in {row.path for row in backend.report.selected}


@pytest.mark.parametrize("select", ["lm_head", "(down,blocks=0) | lm_head", "all | lm_head"])
def test_a_head_is_learned_by_what_it_gives(select: str) -> None:
    model = language(Net)
    base, found = (
        fp4graph.calibrate(model, IDS, select, format="mxfp4", quantizer=how, propagate=False)
        for how in ("gptq", "learned")
    )
    assert set(found.packed) == set(base.packed)
    if select == "lm_head":  # gptq's codes are kept where learning finds none better
        errors = (each.about["output_error"]["lm_head"][1] for each in (found, base))
        assert next(errors) <= next(errors)
