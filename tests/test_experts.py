"""Experts in FP4: every layout equals its dequantised twin."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.closer import relative_l2
from support.experts import MODELS, Batched, E, Indexed, K, N
from support.models import tiny, tokens
from torch import Tensor, nn

import fp4graph
from fp4graph.errors import RefusalError, SelectorError, WeightError
from fp4graph.formats import get_format
from fp4graph.kernels import Problem, Target, choose, grouped

if TYPE_CHECKING:
    from fp4graph import Report


def rounded(w: Tensor, format: str = "nvfp4") -> Tensor:
    return torch.stack([fp4graph.quantize(each, format).dequantize(w.dtype) for each in w])


def twin(model: nn.Module, report: Report, format: str = "nvfp4") -> nn.Module:
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for row in report.selected:
            w = (
                parameters[row.path]
                if len(row.shape) == 3
                else parameters[f"{row.path}.weight"][None]
            )
            stored_KN = tuple(w.shape[-2:]) != row.shape[-2:]
            w.copy_(rounded(w.mT, format).mT if stored_KN else rounded(w, format))
    return model


@torch.no_grad()
def run(model: nn.Module, select: str, **options: object) -> tuple[Tensor, Report]:
    backend = fp4graph.backend(select, **{"inner": "eager", **options})  # type: ignore[arg-type]
    out = torch.compile(model, backend=backend)(tokens(12), use_cache=False).logits
    return out, backend.report


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_equals_the_dequantised_twin(family: str, kernel: str) -> None:
    model = MODELS[family]()
    out, report = run(model, "all,expert", kernel=kernel)
    experts = [row for row in report.selected if row.role == "expert"]
    assert [row.expert for row in experts] == ["gate_up", "down"] * 2
    assert all(row.shape[0] == 4 for row in experts)
    with torch.no_grad():
        expected = twin(model, report)(tokens(12), use_cache=False).logits
        assert relative_l2(out, expected) < 2e-6
        assert relative_l2(out, model(tokens(12), use_cache=False).logits) > 1e-2


def test_an_expert_is_part_of_nothing_else() -> None:
    assert not any(row.role == "expert" for row in run(tiny("mixtral"), "all")[1].selected)
    torch._dynamo.reset()
    _, report = run(tiny("mixtral"), "expert:down,blocks=1", format="mxfp4")
    assert [row.path for row in report.selected] == ["model.layers.1.mlp.experts.down_proj"]
    row = report.selected[0]
    assert row.shape == (4, 64, 96)
    assert row.bytes_dense == 4 * 64 * 96 * 4
    assert row.bytes_packed == 4 * 64 * 96 * 17 // 32
    torch._dynamo.reset()
    with pytest.raises(SelectorError, match=r"gate is only a part of .*: use expert:gate_up"):
        run(tiny("mixtral"), "expert:gate")
    with pytest.raises(SelectorError, match="unknown name 'q'; names are gate, up, gate_up, down"):
        fp4graph.backend("expert:q")


@pytest.mark.slow
def test_runs_through_inductor() -> None:
    model = tiny("mixtral")
    out, report = run(model, "all,expert", inner="inductor")
    with torch.no_grad():
        expected = twin(model, report)(tokens(12), use_cache=False).logits
    assert relative_l2(out, expected) < 1e-5


def test_w4a4_rounds_what_the_experts_take() -> None:
    model = tiny("mixtral")
    w4a16, _ = run(model, "expert")
    torch._dynamo.reset()
    w4a4, report = run(model, "expert", activations="same")
    assert "W4A4" in report.selected[0].reason
    assert 1e-3 < relative_l2(w4a4, w4a16) < 0.3
    torch._dynamo.reset()
    w4a8, _ = run(model, "expert", activations="int8")
    assert 1e-5 < relative_l2(w4a8, w4a16) < 0.03


def test_a_nan_is_refused_by_name_and_number() -> None:
    model = tiny("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.experts\.down_proj, expert 2: 1 of"):
        run(model, "expert")


def test_a_changed_expert_is_packed_again() -> None:
    model = tiny("mixtral")
    backend = fp4graph.backend("expert", inner="eager")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(tokens(12), use_cache=False)
        model.model.layers[0].mlp.experts.down_proj[1].mul_(3)
        out = compiled(tokens(12), use_cache=False).logits
        expected = twin(model, backend.report)(tokens(12), use_cache=False).logits
    assert relative_l2(out, expected) < 2e-6


@pytest.mark.parametrize("which", [1, torch.tensor(2)], ids=["number", "tensor"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_one_expert_by_index(which: Tensor | int, format: str) -> None:
    torch.manual_seed(0)
    model, x = Indexed(), torch.randn(5, K)
    backend = fp4graph.backend("expert", format=format, inner="eager")
    with torch.no_grad():
        out = torch.compile(model, backend=backend)(x, which)
        expected = twin(model, backend.report, format)(x, which)
    assert {row.path: row.shape for row in backend.report.selected} == {
        "up": (E, N, K),
        "down": (E, K, N),
    }
    assert relative_l2(out, expected) < 1e-6


def test_as_many_rows_for_each_expert() -> None:
    torch.manual_seed(0)
    model, x = Batched(), torch.randn(E, 5, K)
    backend = fp4graph.backend("expert", inner="eager")
    with torch.no_grad():
        out = torch.compile(model, backend=backend)(x)
        assert relative_l2(out, twin(model, backend.report)(x)) < 1e-6


def test_a_stack_whose_name_says_nothing_is_known_by_its_use() -> None:
    torch.manual_seed(0)
    model, x = Indexed(), torch.randn(5, K)
    backend = fp4graph.backend("expert:up", inner="eager", model=model)
    with torch.no_grad():
        torch.compile(model, backend=backend)(x, 1)
    assert [row.path for row in backend.report.selected] == ["up"]


def test_what_reads_a_stack_otherwise_is_refused() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(E, N, K))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("mk,enk->emn", x, self.experts)

    backend = fp4graph.backend("expert", inner="eager")
    with torch.no_grad(), pytest.raises(RefusalError, match=r"experts: .*read by einsum, which"):
        torch.compile(Other(), backend=backend)(torch.randn(2, K))


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("offs", [[0, 0, 0], [4, 4, 9], [9, 9, 9], [2, 5, 7]], ids=str)
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_the_op_gives_each_expert_its_rows(kernel: str, offs: list[int], format: str) -> None:
    cpu = Target("cpu")
    problem = Problem(N, K, get_format(format), torch.float32, cpu, experts=E)
    chosen = choose(problem, kernel)
    torch.manual_seed(0)
    w, x = torch.randn(E, N, K), torch.randn(9, K)
    packed = [chosen.prepack(fp4graph.quantize(each, format), problem) for each in w]
    stacked = list(map(torch.stack, zip(*packed, strict=True)))
    op, ends = grouped(chosen.ops[format]), torch.tensor(offs, dtype=torch.int32)
    out = op(x, stacked, ends)
    expected = torch.zeros(9, N, dtype=torch.float64)
    for e, (start, end) in enumerate(zip([0, *offs], offs, strict=False)):
        expected[start:end] = x[start:end].double() @ rounded(w, format)[e].double().T
    assert out.shape == (9, N)
    assert (out.double() - expected).abs().max() < 1e-4
    assert torch.equal(op(x[:0], stacked, ends * 0), x.new_empty(0, N))
    torch.library.opcheck(op, (x, stacked, ends))
