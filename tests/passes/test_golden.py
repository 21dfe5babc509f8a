"""Each pass does what its docstring shows: from the Given graph comes the Result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.graph_text import Built, Case, build, cases, differences
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

import fp4graph
from fp4graph import Calibration, Policy, Scheme
from fp4graph.fingerprint import fingerprint
from fp4graph.graph.site import mark, sites
from fp4graph.kernels import cpu, registry
from fp4graph.kernels.scaled_mm import SCALED_MM
from fp4graph.packed.cache import PackCache
from fp4graph.passes.base import GraphPass, run_passes
from fp4graph.passes.choose import ChooseKernels
from fp4graph.passes.merge import MergeLinears
from fp4graph.passes.pack import PackWeights
from fp4graph.passes.pipeline import PASSES
from fp4graph.passes.select import SelectLinears
from fp4graph.passes.smooth_inputs import SmoothInputs
from fp4graph.passes.tag import TagLinears
from fp4graph.quantizers import Quantizer

EVERY = [(made, case) for made in PASSES for case in cases(made)]
PATHS = {"q_proj": "model.layers.0.self_attn.q_proj", "gate_proj": "model.layers.0.mlp.gate_proj"}


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape), requires_grad=False)


def values() -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(5, 64),
        "normed": torch.randn(5, 64),
        "norm_weight": weight(64),
        "bias": weight(32),
        "experts": weight(2, 64, 32),
        "offs": torch.tensor([2, 5], dtype=torch.int32),
        **{name: weight(32, 64) for name in ("q_weight", "k_weight", "v_weight", "q_proj")},
        "gate_proj": weight(48, 32),
        "d_weight": weight(48, 32),
        "o_weight": weight(64, 48),
    }


def smoothed(weights: dict[str, nn.Parameter]) -> Calibration:
    """Return codes of weights whose columns were multiplied."""
    how = Quantizer.parse("rtn+smooth", fp4graph.NVFP4)
    s = torch.rand(64) + 0.5
    packed = {path: fp4graph.quantize(each * s, "nvfp4") for path, each in weights.items()}
    prints = {path: fingerprint(each) for path, each in weights.items()}
    return Calibration(dict.fromkeys(packed, how), packed, dict.fromkeys(packed, s), prints, {})


def passes_for(made: type[GraphPass], case: Case, built: Built) -> list[GraphPass]:
    """Return what comes before a pass, as far as its case needs it, and the pass."""
    if made is TagLinears:
        names = {built.value(name): (path,) for name, path in PATHS.items() if built.has(name)}
        return [TagLinears(WeakIdKeyDictionary(names))]
    if made is SelectLinears:
        select = "v" if "fused" in case.title else "attn,blocks>4"
        return [SelectLinears(Policy.of(select, Scheme.of()))]
    if made is ChooseKernels:
        return [ChooseKernels("keep")]
    if made is MergeLinears:
        return [MergeLinears()]
    before = [ChooseKernels(), PackWeights(PackCache())]
    return before if made is PackWeights else [*before, made()]


@pytest.mark.parametrize("made, case", EVERY, ids=[f"{m.name}: {c.title}" for m, c in EVERY])
def test_given_becomes_result(
    made: type[GraphPass], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if "rounds inputs itself" in case.title:  # in the place of the kernel that is asked for
        here = {"name": "reference", "backends": (), "dtypes": (torch.float32,)}
        kernel = replace(SCALED_MM, **here, refuses=lambda _: None)
        monkeypatch.setattr(registry, "KERNELS", (kernel,))
    inputs = values()
    if "fused weight of which" in case.title:
        inputs["qkv_weight"] = weight(12, 64)
    if "transposed" in case.title:
        inputs["q_proj"] = weight(64, 32)
    if made is MergeLinears:
        for name in ("q", "k"):
            packed = fp4graph.quantize(inputs[f"{name}_weight"], "nvfp4")
            inputs[f"{name}_tiles"], inputs[f"{name}_row_scale"] = cpu.pack_tiles(packed)
    built = build(case.given, inputs)
    if made is SmoothInputs:
        linears = {site.tag.fqn: built.inputs[site.weight] for _, site in sites(built.gm)}
        found = smoothed(linears)
        for node, site in list(sites(built.gm)):
            scheme = Scheme.of("nvfp4", found.ways[0][1], None, "reference", found)
            mark(node, replace(site, scheme=scheme))
    run_passes(built.gm, built.inputs, passes_for(made, case, built))
    assert differences(built.gm, case.result) == []


def test_every_pass_has_a_case() -> None:
    assert {made for made, _ in EVERY} == set(PASSES)


def test_another_result_is_told() -> None:
    """The comparison itself can fail: on a call, an argument, an order, a mark."""
    given = "q = linear(x, q_weight, None)  # role q; block 7\nk = linear(x, k_weight, None)"
    built = build(given, values())
    assert differences(built.gm, given) == []
    for wrong in (
        "q = torch.relu(x)\nk = linear(x, k_weight, None)",
        "q = linear(x, q_weight, None)\nk = linear(q, k_weight, None)",
        "q = linear(x, q_weight, None)\nk = linear(x, q_weight, None)",
        "q = linear(x, q_weight, None)  # role k\nk = linear(x, k_weight, None)",
        "q = linear(x, q_weight, None)",
    ):
        assert differences(built.gm, wrong), wrong
