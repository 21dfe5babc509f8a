"""A part of a fused weight in FP4: its rows are rounded, the others stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
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


def gpt2_of(tokens_: int) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=tokens_,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("batch, length", [(1, 1), (1, 2), (3, 5), (64, 64), (512, 512)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_parts_do_not_depend_on_how_many_tokens_there_are(
    batch: int, length: int, dynamic: bool
) -> None:
    """2^18 tokens of 192 values are 50 million."""
    model, seen = gpt2_of(length), []
    backend = fp4graph.backend("v", inner=lambda gm, _: seen.append(gm) or _stop, model=model)
    compiled = torch.compile(model.transformer.h[0].attn, backend=backend, dynamic=dynamic)
    with torch.no_grad(), pytest.raises(_Stopped):
        compiled(torch.empty(batch, length, 64))
    assert [row.rows for row in backend.report.selected] == [64]


class _Stopped(Exception):
    pass


def _stop(*args: object) -> None:
    raise _Stopped


class Chosen(nn.Module):
    """Attention over those tokens of a text that a mask chooses: how many depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o_proj = nn.Linear(32, 96, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x[mask]
        q, k, v = self.qkv(x).view(-1, 3, 2, 16).unbind(1)
        q, k, v = (each.transpose(0, 1) for each in (q, k, v))
        y = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.o_proj(y.transpose(0, 1).flatten(1))


def test_parts_where_the_number_of_tokens_depends_on_data() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([Chosen().requires_grad_(False)])})
    x, mask = torch.randn(9, 32), torch.arange(9) % 2 == 0
    backend = fp4graph.backend("v", inner="eager", model=model)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model["layers"][0], backend=backend, fullgraph=True)
        out = compiled(x, mask)
    twin = copy.deepcopy(model["layers"][0])
    twin.qkv.weight[64:] = fp4graph.quantize(twin.qkv.weight[64:]).dequantize()
    assert [row.rows for row in backend.report.selected] == [32]
    assert relative_l2(out, twin(x, mask)) < 2e-6
