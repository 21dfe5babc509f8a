"""Diffusion transformers: joint attention, cross attention, adaptive norms."""

from __future__ import annotations

import copy

import pytest
import torch
from support.architectures import call
from support.closer import relative_l2
from support.diffusion import DIFFUSION, build_diffusion

import fp4graph

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and what it imports
ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
ADDED = {"add_q_proj": "q", "add_k_proj": "k", "add_v_proj": "v", "to_add_out": "o"}
MLP = {"net.0.proj": "up", "net.2": "down"}
CONDITIONS = ("norm1.linear", "norm1_context.linear", "norm.linear", "img_mod.1", "txt_mod.1")
EXTRA = {  # what a kind has beside these
    "FLUX": {"proj_mlp": "up", "proj_out": "o"},
}


def expected(kind: str, path: str) -> str:
    """Return a block linear's role by its last names."""
    known = {
        **ATTENTION,
        **ADDED,
        **MLP,
        **EXTRA.get(kind, {}),
        **dict.fromkeys(CONDITIONS, "other"),
    }
    return next(role for end, role in known.items() if path.endswith(f".{end}"))


@pytest.mark.parametrize("kind", DIFFUSION)
def test_every_linear_has_its_role_and_runs(kind: str) -> None:
    model, inputs = build_diffusion(kind)
    backend = fp4graph.backend("all", inner="eager", model=model)
    out = call(torch.compile(model, backend=backend), inputs)
    inside = [row for row in backend.report if row.block is not None]
    assert {row.path: row.role for row in inside} == {
        row.path: expected(kind, row.path) for row in inside
    }
    picked = backend.report.selected
    assert {row.path for row in picked} == {row.path for row in inside if row.role != "other"}
    assert len(picked) >= 20
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for row in picked:
            weight = twin.get_submodule(row.path).weight
            weight.copy_(fp4graph.quantize(weight).dequantize())
    assert relative_l2(out, call(twin, inputs)) < 1e-5
    assert relative_l2(out, call(model, inputs)) > 1e-2
