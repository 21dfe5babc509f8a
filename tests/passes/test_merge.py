"""Merged linears: the bits of separate ones, whom they are merged with, and when they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import tiny, tokens
from torch import nn

import fp4graph
from fp4graph.kernels import KERNELS, Target, choose

CPU = next(kernel for kernel in KERNELS if kernel.name == "cpu")
pytestmark = pytest.mark.skipif(not CPU.merged, reason="no kernel here merges")


class Graphs:
    """An inner compiler that runs graphs as they are and counts their calls of fp4graph's ops."""

    def __init__(self) -> None:
        self.ops: list[str] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        names = (str(node.target) for node in gm.graph.nodes)
        self.ops += [name.removeprefix("fp4graph.") for name in names if "fp4graph." in name]
        return gm.forward


@torch.no_grad()
def run(model: nn.Module, ids: torch.Tensor, select: Any, **options: Any) -> tuple[Any, ...]:
    torch._dynamo.reset()
    graphs = Graphs()
    backend = fp4graph.backend(select, inner=graphs, model=model, **options)
    logits = torch.compile(model, backend=backend)(ids, use_cache=False).logits
    return logits, graphs.ops, backend.report


@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "format, activations",
    [("nvfp4", "none"), ("mxfp4", "int8"), ("mxfp4", "auto"), ("fp8", "none")],
)
def test_the_bits_are_those_of_separate_linears(
    format: str, dtype: torch.dtype, length: int, activations: str, monkeypatch: Any
) -> None:
    model = tiny("qwen2").to(dtype)
    options = {"format": format, "activations": activations}
    ids = tokens(length)
    merged, ops, _ = run(model, ids, "all", **options)
    monkeypatch.setenv("FP4GRAPH_SKIP", "merge")
    separate, before, _ = run(model, ids, "all", **options)
    assert torch.equal(merged, separate)
    blocks = model.config.num_hidden_layers
    assert len(before) == 7 * blocks
    assert sum("merged" in op for op in ops) == 2 * blocks  # q k v; gate up
    assert len(ops) == 4 * blocks


def test_rows_say_with_whom() -> None:
    *_, report = run(tiny("qwen2"), tokens(4), "all")
    rows = {row.path: row for row in report}
    block = "model.layers.0"
    k, v = f"{block}.self_attn.k_proj", f"{block}.self_attn.v_proj"
    assert rows[f"{block}.self_attn.q_proj"].merged == (k, v)
    assert rows[f"{block}.mlp.up_proj"].merged == (f"{block}.mlp.gate_proj",)
    assert rows[f"{block}.mlp.down_proj"].merged == ()
    assert "k_proj, v_proj" in str(report.table(plans=True))


def test_what_runs_otherwise_is_not_merged() -> None:
    mix = {"q,v": {"format": "nvfp4"}, "k": {"format": "mxfp4"}, "gate": None}
    _, ops, report = run(tiny("qwen2"), tokens(4), mix)
    rows = {row.path.rpartition(".")[2]: row for row in report if row.block == 0}
    assert rows["q_proj"].merged == ("model.layers.0.self_attn.v_proj",)
    assert rows["k_proj"].merged == ()
    assert not any("mxfp4" in op and "merged" in op for op in ops)


def test_a_converted_model_is_merged_by_the_backend() -> None:
    model, ids = tiny("qwen2"), tokens(5)
    fp4graph.convert(model, "all")
    with torch.no_grad():
        eager = model(ids, use_cache=False).logits
    logits, ops, _ = run(model, ids, "none")
    assert torch.equal(logits, eager)
    assert sum("merged" in op for op in ops) == 2 * model.config.num_hidden_layers


class Late(nn.Module):
    """Its second bias is made after its first linear has run."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x)
        k = torch.nn.functional.linear(x, self.k_proj.weight, q.sum((0, 1)))
        return q + k


@torch.no_grad()
def test_one_that_needs_another_s_result_is_not_merged() -> None:
    model, x, graphs = Late().requires_grad_(False), torch.randn(2, 3, 32), Graphs()
    backend = fp4graph.backend("q,k", inner=graphs, model=model)
    torch.compile(model, backend=backend)(x)
    assert [op.partition(".")[0] for op in graphs.ops] == ["cpu_nvfp4", "cpu_nvfp4"]


@pytest.mark.parametrize("op", CPU.merged, ids=str)
def test_results_share_no_memory_and_pass_opcheck(op: Any) -> None:
    base = op.name().rpartition("_")[2]
    made = [fp4graph.quantize(torch.randn(n, 64), base) for n in (32, 5)]
    asked = [
        fp4graph.kernels.Problem(*each.shape, each.format, torch.float32, Target("cpu"))
        for each in made
    ]
    assert {choose(each).name for each in asked} == {"cpu"}
    pairs = [CPU.prepack(*each) for each in zip(made, asked, strict=True)]
    lists = [list(each) for each in zip(*pairs, strict=True)]
    x, biases = torch.randn(3, 64), [torch.randn(32), None]
    torch.library.opcheck(CPU.merged[op], (x, *lists, biases))
    many = CPU.merged[op](x, *lists, biases)
    for y, tensors, bias in zip(many, pairs, biases, strict=True):
        assert torch.equal(y, op(x, *tensors, bias))
    assert many[0].untyped_storage().data_ptr() != many[1].untyped_storage().data_ptr()
