"""A part of a fused weight in FP4: its rows are rounded, the others stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from support.closer import relative_l2
from support.models import tiny, tokens
from torch import Tensor, nn

import fp4graph
from fp4graph.errors import SelectorError

HEADS = {  # the rows of q, k and v in a qkv
    "phi3": (range(64), range(64, 96), range(96, 128)),
    "gpt2": (range(64), range(64, 128), range(128, 192)),
    "falcon": (range(64), range(64, 80), range(80, 96)),
    "gpt_neox": tuple(
        [head * 48 + start + at for head in range(4) for at in range(16)] for start in (0, 16, 32)
    ),
}
SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in HEADS if family != "gpt2"]
FAMILIES = ["gpt2", *SLOW]


def rounded(model: nn.Module, report: fp4graph.Report, rows: list[int]) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for row in report.selected:
            module = twin.get_submodule(row.path)
            w = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            w[rows] = fp4graph.quantize(w[rows]).dequantize(w.dtype)
    return twin


@torch.no_grad()
def run(model: nn.Module, select: object, **options: object) -> tuple[Tensor, fp4graph.Report]:
    torch._dynamo.reset()
    backend = fp4graph.backend(select, **{"inner": "eager", **options})  # type: ignore[arg-type]
    return torch.compile(model, backend=backend)(tokens(), use_cache=False).logits, backend.report


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(tokens(), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("select, parts", [("v", [2]), ("q,k", [0, 1])])
def test_rounds_the_rows_of_the_part_alone(family: str, select: str, parts: list[int]) -> None:
    model = tiny(family)
    rows = sorted(row for part in parts for row in HEADS[family][part])
    out, report = run(model, select)
    assert {row.role for row in report.selected} == {"qkv"}
    assert relative_l2(out, logits(rounded(model, report, rows))) < 2e-6
    assert relative_l2(out, logits(model)) > 1e-3
    row = report.selected[0]
    assert (row.rows, row.parameters) == (len(rows), len(rows) * 64)
    kept = (row.shape[0] - len(rows)) * 64 * 4
    assert kept < row.bytes_packed < kept + len(rows) * 64  # type: ignore[operator]
    assert f"for the rows of {select}, the others stay dense, as nvfp4 W4A16" in row.reason


def test_up_of_a_gate_up() -> None:
    model = tiny("phi3")
    out, report = run(model, "up")
    assert relative_l2(out, logits(rounded(model, report, list(range(96, 192))))) < 2e-6
    whole, _ = run(model, "gate,up")
    again, _ = run(model, "gate_up")
    assert torch.equal(whole, again)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_runs_through_inductor(family: str) -> None:
    model = tiny(family)
    expected, _ = run(model, "v")
    out, _ = run(model, "v", inner="inductor")
    assert relative_l2(out, expected) < 1e-5


def test_w4a4_rounds_the_input_of_the_part_alone() -> None:
    model = tiny("gpt2")
    w4a16, _ = run(model, "v")
    w4a4, report = run(model, "v", activations="same")
    assert 1e-4 < relative_l2(w4a4, w4a16) < 0.3
    assert "W4A4" in report.selected[0].reason


def test_a_mapping_may_take_a_part_out_but_not_mix_formats() -> None:
    model = tiny("gpt2")
    out, report = run(model, {"attn": "nvfp4", "k": None})
    assert {row.rows for row in report.selected if row.role == "qkv"} == {128}
    only, _ = run(model, "q,v,o")
    assert torch.equal(out, only)
    with pytest.raises(SelectorError, match=r"parts of the fused .*c_attn are to run in different"):
        run(model, {"attn": "nvfp4", "k": "mxfp4"})


def test_a_changed_weight_is_rounded_again() -> None:
    model = tiny("gpt2")
    backend = fp4graph.backend("v", inner="eager")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(tokens(), use_cache=False)
        model.transformer.h[0].attn.c_attn.weight.mul_(1.5)
        out = compiled(tokens(), use_cache=False).logits
    expected = logits(rounded(model, backend.report, list(HEADS["gpt2"][2])))
    assert relative_l2(out, expected) < 2e-6


def test_where_rows_are_not_known_a_part_is_an_error() -> None:
    class Mixed(nn.Module):
        """One whose q, k and v are sums over all rows."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj, self.mix = nn.Linear(32, 96), nn.Buffer(torch.randn(96, 96))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.qkv_proj(x) @ self.mix).chunk(3, -1)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    torch._dynamo.reset()
    model = nn.ModuleDict({"layers": nn.ModuleList([Mixed()])})
    call = torch.compile(model["layers"][0], backend=fp4graph.backend("v", model=model))
    with torch.no_grad(), pytest.raises(SelectorError, match="v is only a part of the fused"):
        call(torch.randn(1, 4, 32))
