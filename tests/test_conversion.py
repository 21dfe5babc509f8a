"""Models that own their packed weights: the same numbers as the backend's, in less memory."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import TYPE_CHECKING, Any
from weakref import ref

import pytest
import torch
from support.calibration import BATCHES
from support.models import tiny, tokens
from torch import nn

import fp4graph
from fp4graph import ModelError, OptionError, RefusalError, SelectorError, WeightError
from fp4graph.kernels.cpu import CPU
from fp4graph.packed.linear import FP4Linear
from fp4graph.scheme import Scheme

if TYPE_CHECKING:
    from pathlib import Path

IDS = tokens(16)
WAYS = [
    ("all", {}),
    ("attn,blocks<1", {"format": "mxfp4"}),
    ("all", {"activations": "same"}),
    ("all", {"activations": "int8"}),
    ("all", {"activations": "auto"}),
    ("mlp", {"quantizer": "rtn@16", "activations": "same"}),
    ("all", {"quantizer": "scale-search@32"}),
    ({"all": "nvfp4", "v": None, "down": "mxfp4"}, {}),
    ("all", {"kernel": "reference"}),
]


def fresh(family: str) -> Any:
    return tiny(family).requires_grad_(False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def converted(family: str = "llama", select: Any = "all", **options: Any) -> Any:
    model = fresh(family)
    fp4graph.convert(model, select, **options)
    return model


FAMILIES = ["gpt2", "qwen3", "phi3", "gemma3", "falcon"]


@pytest.mark.parametrize(
    "family, select, options",
    [("llama", *way) for way in WAYS] + [(family, *WAYS[2]) for family in FAMILIES],
)
def test_the_logits_are_the_compiled_models(
    family: str, select: Any, options: dict[str, Any]
) -> None:
    compiled = fresh(family)
    backend = fp4graph.backend(select, inner="eager", model=compiled, **options)
    model = fresh(family)
    report = fp4graph.convert(model, select, **options)
    assert torch.equal(logits(model), logits(torch.compile(compiled, backend=backend)))
    rows = {row.path: (row.selected, row.kernel, row.reason) for row in report}
    assert rows == {row.path: (row.selected, row.kernel, row.reason) for row in backend.report}
    assert fp4graph.report_of(model) is report


def test_a_part_of_a_fused_weight() -> None:
    for family, select in (("gpt2", "v"), ("phi3", "up"), ("gpt2", "q,v")):
        compiled = fresh(family)
        backend = fp4graph.backend(select, inner="eager", model=compiled)
        model = converted(family, select)
        want = logits(torch.compile(compiled, backend=backend))
        assert torch.allclose(logits(model), want, atol=1e-5)
        (first, *_) = (each for each in model.modules() if isinstance(each, FP4Linear))
        assert first.rest is not None


def test_the_dense_weight_is_freed_and_nothing_is_kept_twice() -> None:
    model = fresh("llama")
    weights = [ref(each.weight) for each in model.modules() if isinstance(each, nn.Linear)]
    fp4graph.convert(model, "all")
    gc.collect()
    alive = sum(weight() is not None for weight in weights)
    assert alive == 1, "the head's"
    for module in model.modules():
        if isinstance(module, FP4Linear):
            assert module.kernel is CPU
            assert module.qdata is None
            assert module.scale is None
            held = sum(each.nbytes for each in module.buffers())
            assert held < 0.2 * 4 * module.in_features * module.out_features + 4 * 128


def test_a_state_dict_has_the_plain_layout_and_comes_back() -> None:
    model = converted()
    state = model.state_dict()
    name = "model.layers.0.self_attn.q_proj"
    assert {key for key in state if key.startswith(name)} == {
        f"{name}.qdata", f"{name}.scale", f"{name}.per_tensor_scale"
    }  # fmt: skip
    dense = fresh("llama").get_submodule(name).weight
    packed = fp4graph.quantize(dense, "nvfp4")
    assert torch.equal(state[f"{name}.qdata"], packed.qdata)
    assert state[f"{name}.scale"].dtype == torch.float8_e4m3fn
    assert torch.equal(state[f"{name}.scale"].view(torch.uint8), packed.scale.view(torch.uint8))
    other = fresh("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    fp4graph.convert(other, "all")
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({key: value for key, value in state.items() if "qdata" not in key})


def test_copies_and_pickles(tmp_path: Path) -> None:
    model = converted("gpt2")
    want = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), want)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(again), want)
    assert len(fp4graph.report_of(again)) == len(fp4graph.report_of(model))
    assert torch.equal(logits(model), want), "and the model itself is as it was"
    assert not [key for key in model.state_dict() if "layout" in key]


def test_to_another_dtype_the_weight_keeps_its_bits() -> None:
    model = converted("gpt2")
    before = model.state_dict()
    model.to(torch.bfloat16)
    after = model.state_dict()
    for name, value in before.items():
        if name.endswith(("qdata", ".scale")):
            assert torch.equal(value.view(torch.uint8), after[name].view(torch.uint8))
        if name.endswith("per_tensor_scale"):
            assert torch.equal(value, after[name])
    module = next(each for each in model.modules() if isinstance(each, FP4Linear))
    assert module.dtype == torch.bfloat16
    cast = fresh("gpt2").to(torch.bfloat16)
    with torch.no_grad():
        assert model(IDS, use_cache=False).logits.dtype == torch.bfloat16
        assert torch.allclose(
            model(IDS, use_cache=False).logits.float(),
            cast(IDS, use_cache=False).logits.float(), atol=0.5, rtol=0.5,
        )  # fmt: skip


def test_to_meta_and_back_by_a_state_dict() -> None:
    model = converted()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    want = logits(model)
    hull = copy.deepcopy(model).to("meta")
    hull.load_state_dict(state, assign=True)
    for name, buffer in fresh("llama").named_buffers():  # tables of cosines are in no state dict
        owner, _, last = name.rpartition(".")
        setattr(hull.get_submodule(owner), last, buffer)
    assert torch.equal(logits(hull), want)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_on_top(backend: str) -> None:
    model = converted(select={"all": "nvfp4", "v": {"activations": "same"}})
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.allclose(logits(compiled), logits(model), atol=1e-4)


def test_generates_and_takes_hooks() -> None:
    model = converted()
    seen = []
    module = model.get_submodule("model.layers.0.mlp.down_proj")
    module.register_forward_hook(lambda *args: seen.append(args[2].shape))
    out = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 7)
    assert len(seen) == 3


def test_a_tied_head_leaves_the_embedding_as_it_is() -> None:
    model = fresh("gpt2")
    embedding = model.transformer.wte.weight
    fp4graph.convert(model, "all | lm_head")
    assert model.transformer.wte.weight is embedding
    assert isinstance(model.lm_head, FP4Linear)
    assert logits(model).isfinite().all()


def test_a_module_that_stands_in_two_places_is_one_afterwards() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(64, 64)
            self.two = self.one

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x).relu())

    model = Twice().requires_grad_(False)
    x = torch.randn(3, 64)
    report = fp4graph.convert(model, "path:*", inputs={"x": x})
    assert model.one is model.two
    assert isinstance(model.one, FP4Linear)
    assert len(report.selected) == 1
    assert model(x).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["gptq", "gptq:scale-search+smooth"])
def test_calibrated_codes(quantizer: str, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    fp4graph.calibrate(fresh("llama"), BATCHES, "all", quantizer=quantizer, out=file)
    compiled = fresh("llama")
    backend = fp4graph.backend(calibration=file, inner="eager", model=compiled)
    model = converted(calibration=file)
    want = logits(torch.compile(compiled, backend=backend))
    assert torch.allclose(logits(model), want, atol=1e-5)
    again = fresh("llama")
    fp4graph.convert(again, calibration=file)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))


def test_refusals_leave_the_model_as_it_was() -> None:
    model = fresh("mixtral")
    options: dict[str, Any] = {"kernel": "dequantized"}
    with pytest.raises(RefusalError, match="it keeps no experts"):
        fp4graph.convert(model, "attn,expert", **options)
    assert not any(isinstance(each, FP4Linear) for each in model.modules())
    report = fp4graph.convert(model, "attn,expert", on_refusal="keep", **options)
    assert report.refused
    assert {row.role for row in report.selected} == {"q", "k", "v", "o"}
    assert logits(model).isfinite().all()
    other = fresh("llama")
    with pytest.raises(SelectorError, match="matches nothing"):
        fp4graph.convert(other, "blocks>99")
    with pytest.raises(OptionError, match="on_refusal"):
        fp4graph.convert(other, on_refusal="ignore")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="was not converted"):
        fp4graph.report_of(other)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.up_proj"):
        fp4graph.convert(other)


@pytest.mark.parametrize("transposed", [False, True])
def test_code_that_reads_the_weight_gets_the_product(transposed: bool) -> None:
    """As Mamba's `dt_proj.weight @ x` does: nothing but products comes of what stands there."""
    torch.manual_seed(0)
    w, x = torch.randn(48, 32), torch.randn(5, 32)
    packed = fp4graph.quantize(w)
    module = FP4Linear(packed, Scheme(), torch.float32, bias=torch.randn(48), transposed=transposed)
    want = packed.dequantize(torch.float32)
    weight = module.weight.T if transposed else module.weight
    assert module.weight.shape == (want.T.shape if transposed else want.shape)
    pairs = [
        (weight @ x.T, want @ x.T),
        (weight @ x[0], want @ x[0]),
        (x @ weight.t(), x @ want.T),
        (torch.nn.functional.linear(x, weight, module.bias), module(x)),
        (torch.addmm(module.bias, x, weight.mT), module(x)),
    ]
    for number, (got, good) in enumerate(pairs):
        assert torch.allclose(got, good, atol=1e-4), number
    for wrong in (
        lambda: weight[0],
        lambda: torch.nn.functional.embedding(torch.tensor([0]), module.weight),
        lambda: torch.cat((module.weight, module.weight)),
        lambda: weight @ x,
    ):
        with pytest.raises(RefusalError, match="packed weights"):
            wrong()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.out = nn.Linear(64, 64)
        self.scaled = Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(self.out(self.attention(x, x, x, need_weights=False)[0]))


class Scaled(nn.Linear):
    """More than a linear, though it is one by its class."""

    def __init__(self) -> None:
        super().__init__(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def test_a_module_keeps_what_it_computes_besides() -> None:
    torch.manual_seed(0)
    model, x = Attention().eval().requires_grad_(False), torch.randn(1, 5, 64)
    with pytest.raises(RefusalError, match="read by multi_head_attention_forward"):
        fp4graph.convert(model, "path:*", inputs={"x": x})
    report = fp4graph.convert(model, "path:*", inputs={"x": x}, on_refusal="keep")
    assert {row.path for row in report.selected} == {"out", "scaled"}
    assert isinstance(model.out, FP4Linear)
    assert isinstance(model.scaled, Scaled)
    twin = copy.deepcopy(model)
    twin.out = nn.Linear(64, 64)
    with torch.no_grad():
        y = model.out(model.attention(x, x, x, need_weights=False)[0])
        w = model.scaled.weight.packed.dequantize(torch.float32)
        want = 3 * torch.nn.functional.linear(y, w, model.scaled.bias)
        assert torch.allclose(model(x), want, atol=1e-5)
