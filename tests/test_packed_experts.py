"""Stacks of experts that own their packed weights."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from support.calibration import BATCHES
from support.experts import MODELS, Batched, E, Indexed, K, N
from support.models import tokens
from torch import nn
from torch.nn.functional import linear

import fp4graph
from fp4graph import RefusalError, WeightError
from fp4graph.formats import FORMATS
from fp4graph.packed.experts import FP4Experts
from fp4graph.scheme import Scheme

if TYPE_CHECKING:
    from pathlib import Path

WAYS = [
    {},
    {"format": "mxfp4", "activations": "same"},
    {"activations": "int8"},
    {"kernel": "reference"},
]


def fresh(family: str) -> Any:
    return MODELS[family]().requires_grad_(False)


def converted(family: str, **options: Any) -> Any:
    model = fresh(family)
    fp4graph.convert(model, "all,expert", **options)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tokens(12), use_cache=False).logits


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_the_logits_are_the_compiled_models(family: str, options: dict[str, Any]) -> None:
    dense = fresh(family)
    backend = fp4graph.backend("all,expert", inner="eager", **options)
    want = logits(torch.compile(dense, backend=backend))
    model = fresh(family)
    report = fp4graph.convert(model, "all,expert", **options)
    assert torch.equal(logits(model), want)
    rows = {row.path: (row.selected, row.kernel, row.reason) for row in report}
    assert rows == {row.path: (row.selected, row.kernel, row.reason) for row in backend.report}
    stacks = [module for module in model.modules() if isinstance(module, FP4Experts)]
    assert len(stacks) == 4
    assert not any(parameter.ndim == 3 for parameter in model.parameters())
    torch._dynamo.reset()
    assert torch.equal(logits(torch.compile(model, backend="eager", fullgraph=True)), want)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("implementation", ["batched_mm", "eager"])
def test_transformers_other_ways_give_the_same(family: str, implementation: str) -> None:
    model = converted(family)
    want = logits(model)
    model.config._experts_implementation = implementation
    assert torch.allclose(logits(model), want, atol=1e-6)
    out = model.generate(tokens(5), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 8)


@pytest.mark.parametrize("family", MODELS)
def test_copies_pickles_moves_and_saves(family: str, tmp_path: Path) -> None:
    model = converted(family)
    want = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), want)
    model.save_pretrained(tmp_path / "packed")
    again = fp4graph.load(str(tmp_path / "packed"))
    assert torch.equal(logits(again), want)
    again.save_pretrained(tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("packed", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    fresh(family).save_pretrained(tmp_path / "dense")
    loaded = fp4graph.load(str(tmp_path / "dense"), "all,expert")
    assert torch.equal(logits(loaded), want)
    assert logits(model.to(torch.bfloat16)).dtype == torch.bfloat16


def test_the_plain_layout_is_each_experts_own() -> None:
    model = converted("mixtral")
    dense = fresh("mixtral").model.layers[0].mlp.experts.down_proj
    state = model.state_dict()
    name = "model.layers.0.mlp.experts.down_proj"
    assert {key for key in state if key.startswith(name)} == {
        f"{name}.qdata", f"{name}.scale", f"{name}.per_tensor_scale"
    }  # fmt: skip
    for expert, weight in enumerate(dense):
        packed = fp4graph.quantize(weight, "nvfp4")
        assert torch.equal(state[f"{name}.qdata"][expert], packed.qdata)
        scale = state[f"{name}.scale"][expert]
        assert torch.equal(scale.view(torch.uint8), packed.scale.view(torch.uint8))
        assert torch.equal(state[f"{name}.per_tensor_scale"][expert], packed.per_tensor_scale)


@pytest.mark.slow
def test_calibrated_experts(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    fp4graph.calibrate(fresh("mixtral"), BATCHES, "expert", quantizer="gptq", out=file)
    dense = fresh("mixtral")
    backend = fp4graph.backend("expert", calibration=file, inner="eager")
    model = fresh("mixtral")
    fp4graph.convert(model, "expert", calibration=file)
    assert torch.allclose(logits(model), logits(torch.compile(dense, backend=backend)), atol=1e-6)


def test_one_expert_and_as_many_rows_for_each() -> None:
    torch.manual_seed(0)
    model, x = Indexed().requires_grad_(False), torch.randn(5, K)
    twin = copy.deepcopy(model)
    fp4graph.convert(model, "expert", inputs={"x": x, "which": 1})
    for parameter in (twin.up, twin.down):
        stored = [each.T if parameter is twin.down else each for each in parameter]
        near = [fp4graph.quantize(each).dequantize(each.dtype) for each in stored]
        parameter.data = torch.stack([e.T if parameter is twin.down else e for e in near])
    for which in (1, torch.tensor(2)):
        assert torch.allclose(model(x, which), twin(x, which), atol=1e-4)
    batched, x = Batched().requires_grad_(False), torch.randn(E, 5, K)
    want = torch.stack([fp4graph.quantize(w.T).dequantize(w.dtype).T for w in batched.experts])
    fp4graph.convert(batched, "expert", inputs={"x": x})
    assert torch.allclose(batched(x), torch.bmm(x, want), atol=1e-4)


def stack(*, transposed: bool) -> tuple[FP4Experts, torch.Tensor]:
    torch.manual_seed(0)
    weights = [fp4graph.quantize(torch.randn(N, K)) for _ in range(E)]
    shape = (E, K, N) if transposed else (E, N, K)
    scheme = Scheme(FORMATS["nvfp4"])
    made = FP4Experts(
        weights, (E, N, K), torch.Size(shape), scheme, torch.float32, transposed=transposed
    )
    w = torch.stack([each.dequantize(torch.float32) for each in weights])
    return made, w.mT if transposed else w


@pytest.mark.parametrize("transposed", [False, True])
def test_multiplies_as_the_parameter_would(transposed: bool) -> None:
    made, w = stack(transposed=transposed)
    nk, w_NK = (made.mT, w.mT) if transposed else (made, w)
    x, bias, rows = torch.randn(4, K), torch.randn(N), torch.tensor([2, 0, 2, 1])
    ends = torch.tensor([1, 3, 4], dtype=torch.int32)
    pairs = [
        (linear(x, nk[1], bias), linear(x, w_NK[1], bias)),
        (x @ nk[2].T, x @ w_NK[2].T),
        (torch.mm(x, nk[torch.tensor(0)].mT), x @ w_NK[0].T),
        (torch.addmm(bias, x, nk[2].T), torch.addmm(bias, x, w_NK[2].T)),
        (nk[1] @ x.T, w_NK[1] @ x.T),
        (torch.bmm(x.expand(E, -1, -1), nk.transpose(1, 2)), x @ w_NK.mT),
        (torch.bmm(nk[rows], x[:, :, None]), torch.bmm(w_NK[rows], x[:, :, None])),
        (torch.bmm(x[:, None], nk.mT[rows]), torch.bmm(x[:, None], w_NK[rows].mT)),
        (
            torch._grouped_mm(x, nk.transpose(-2, -1), offs=ends),
            torch.stack([x[i] @ w_NK[e].T for i, e in enumerate((0, 1, 1, 2))]),
        ),
    ]
    for number, (got, want) in enumerate(pairs):
        assert torch.allclose(got, want, atol=1e-4), number
    assert made.shape == w.shape
    assert len(list(made)) == E
    assert made.view(-1, *w.shape[1:]).shape == w.shape
    assert nk[rows].shape == w_NK[rows].shape
    assert nk.mT.size(-1) == N if not transposed else K


def test_what_cannot_be_computed_is_an_error() -> None:
    made, _ = stack(transposed=False)
    x = torch.randn(4, N)
    with pytest.raises(RefusalError, match=r"linear\(\[4, 48\], \[40, 48\]\)"):
        linear(x, made[0].T)
    for wrong in (
        lambda: torch.add(x, made),
        lambda: linear(torch.randn(4, K + 1), made[0]),
        lambda: torch.bmm(torch.randn(2, 4, K), made.mT),
        lambda: made.transpose(0, 1),
        lambda: made.view(-1, K),
        lambda: made[0][0],
        lambda: made[0:2],
    ):
        with pytest.raises(RefusalError):
            wrong()


def test_a_nan_is_refused_by_name_and_number() -> None:
    model = fresh("mixtral")
    model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.experts\.down_proj, expert 2: 1 of"):
        fp4graph.convert(model, "expert")


def test_a_parameter_that_two_modules_hold() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Batched()
            self.two = Batched()
            self.two.experts = self.one.experts

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) + self.two(x)

    model, x = Twice().requires_grad_(False), torch.randn(E, 5, K)
    fp4graph.convert(model, "expert", inputs={"x": x})
    assert torch.equal(model(x), 2 * model.one(x))


def test_saved_experts_need_the_method_to_be_known(tmp_path: Path) -> None:
    converted("mixtral").save_pretrained(tmp_path)
    assert fp4graph.FP4Config is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, FP4Experts)
