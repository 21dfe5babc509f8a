"""Each pass on traced tiny models: op counts before and after, marks, refusals."""

from __future__ import annotations

import pytest
import torch
from support.models import BLOCKS, FAMILIES, tiny, tokens
from support.recorder import Recorder
from torch._dynamo.exc import BackendCompilerFailed

from fp4graph import LinearRow, OptionError, Policy, RefusalError, Scheme, SelectorError
from fp4graph.graph.site import sites
from fp4graph.passes.pipeline import bindings, plan_passes, rewrite_passes, rows
from fp4graph.passes.tag import TagLinears


def record(
    family: str,
    select: object = "all",
    activations: str | None = None,
    on_refusal: str = "raise",
    rewrite: bool = True,
) -> Recorder:
    policy = Policy.of(select, Scheme.of(activations=activations, kernel="reference"))  # type: ignore[arg-type]
    model = tiny(family)  # in transformers 5.24 a wrapper takes it as the first of *args
    passes = (TagLinears.of(model), *plan_passes(policy, on_refusal))  # type: ignore[arg-type]
    recorder = Recorder(*passes, *(rewrite_passes() if rewrite else ()))
    with torch.no_grad():
        torch.compile(model, backend=recorder)(tokens(), use_cache=False)
    return recorder


def marks(recorder: Recorder) -> dict[str, LinearRow]:
    assert recorder.gm is not None
    return {row.path: row for row in rows(recorder.gm)}


DENSE_OP = {"gpt2": "addmm", "falcon": "matmul"}


@pytest.mark.parametrize("family", FAMILIES)
def test_rewrite_trades_each_selected_linear_for_one_op_and_touches_nothing_else(
    family: str,
) -> None:
    recorder = record(family)
    selected = sum(row.selected for row in marks(recorder).values())
    dense = DENSE_OP.get(family, "linear")
    assert recorder.after["reference_nvfp4.default"] == selected > 0
    assert recorder.before[dense] - recorder.after[dense] == selected
    changed = {"reference_nvfp4.default", dense}
    assert {k: v for k, v in recorder.before.items() if k not in changed} == {
        k: v for k, v in recorder.after.items() if k not in changed
    }


def test_only_rewrite_changes_ops() -> None:
    recorder = record("llama")
    assert [r.name for r in recorder.records] == [
        "tag",
        "select",
        "choose",
        "pack",
        "smooth_inputs",
        "rotate_inputs",
        "rewrite",
        "merge",
    ]
    assert [bool(r.changes) for r in recorder.records] == [False] * 6 + [True, False]


def test_none_changes_no_op() -> None:
    recorder = record("llama", "none")
    assert recorder.before == recorder.after
    assert all(row.reason == "not selected" for row in marks(recorder).values())


def test_disjoint_selectors_add_up() -> None:
    count = [
        record("llama", select).after["reference_nvfp4.default"]
        for select in ("q", "k,v", "o", "mlp", "all")
    ]
    assert sum(count[:4]) == count[4]


def test_w4a4_quantises_each_distinct_input_once() -> None:
    recorder = record("llama", "all", activations="same")
    inputs = 4 * BLOCKS  # of q k v, of o, of gate up, of down
    assert recorder.after["fake_quantize.default"] == inputs


def test_a_tied_head_has_the_heads_role_and_the_embeddings_weight() -> None:
    recorder = record("gpt2", "lm_head")
    (row,) = (row for row in marks(recorder).values() if row.selected)
    assert (row.path, row.role, row.block) == ("lm_head", "lm_head", None)
    assert recorder.gm is not None
    (bound,) = bindings(recorder.gm)
    weight = recorder.inputs[bound.index]
    assert weight.shape == (96, 64)


def test_rows_say_who_chose_and_how() -> None:
    found = marks(record("llama", {"all": "nvfp4", "down,blocks<1": "mxfp4", "v": None}))
    assert found["model.layers.0.mlp.down_proj"].reason == "`down,blocks<1` as mxfp4 W4A16"
    assert found["model.layers.1.mlp.down_proj"].reason == "`all` as nvfp4 W4A16"
    assert found["model.layers.1.self_attn.v_proj"].reason == "kept dense by `v`"
    assert found["lm_head"].reason == "not selected"
    assert found["model.layers.1.self_attn.v_proj"].bytes_packed is None
    assert found["model.layers.0.mlp.down_proj"].bytes_packed == 64 * 3 * 17


def test_a_refused_linear_raises_by_default_and_can_be_kept() -> None:
    where = "kernel triton: it runs on cuda and hip, and the weight is on cpu"
    with pytest.raises(BackendCompilerFailed, match=where) as caught:  # as Dynamo wraps it
        record("llama", {"q": {"kernel": "triton"}})
    assert isinstance(caught.value.inner_exception, RefusalError)
    kept = marks(record("llama", {"q,v": {"kernel": "triton"}, "v": "nvfp4"}, on_refusal="keep"))
    q = kept["model.layers.0.self_attn.q_proj"]
    assert not q.selected
    assert q.reason == f"refused: {where}"
    assert kept["model.layers.0.self_attn.v_proj"].selected


def test_the_error_names_the_linears_and_the_way_out() -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        record("llama", {"attn": {"kernel": "triton"}})
    assert isinstance(caught.value.inner_exception, RefusalError)
    text = str(caught.value.inner_exception)
    assert "self_attn.q_proj" in text
    assert 'on_refusal="keep"' in text
    assert "(and 5 more)" in text


@pytest.mark.parametrize(
    "select, words",
    [
        ({"all": "fp5"}, "formats are"),
        ({"all": {"fromat": "nvfp4"}}, "unknown option 'fromat'"),
        ({"all": {"quantizer": "magic"}}, "quantizers are rtn"),
        ({"all": {"calibration": "file"}}, "options are format, quantizer, activations, kernel"),
        ({"all": {"activations": "int3"}}, "expected None, 'none' \\(W4A16\\), 'same'"),
        ({"all": {"kernel": "warp"}}, "kernels are"),
        ({}, "expected a selector"),
        (7, "expected a selector"),
    ],
)
def test_a_policy_that_cannot_be_read(select: object, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Policy.of(select, Scheme.of())  # type: ignore[arg-type]


def test_a_policy_with_a_bad_selector() -> None:
    with pytest.raises(SelectorError, match="did you mean 'attn'"):
        Policy.of({"atn": "nvfp4"}, Scheme.of())


def test_later_entries_win_and_options_merge_with_the_default() -> None:
    policy = Policy.of({"all": {"activations": "same"}, "q": "mxfp4"}, Scheme.of("mxfp4:even"))
    (_, first), (_, second) = policy.entries
    assert (str(first), str(second)) == ("mxfp4:even W4A4", "mxfp4 W4A16")
    assert str(policy) == "all: mxfp4:even W4A4; q: mxfp4 W4A16"


def test_a_weight_that_is_no_parameter_is_refused() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(16, 16, bias=False)
            self.register_buffer("table", torch.randn(16, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.linear(x, self.table)
            return torch.nn.functional.linear(x, self.q_proj.weight * 2) + self.q_proj(x)

    policy = Policy.of("path:*", Scheme.of())
    recorder = Recorder(TagLinears(), *plan_passes(policy, "keep"))
    with torch.no_grad():
        torch.compile(Odd(), backend=recorder)(torch.randn(2, 16))
    assert recorder.gm is not None
    reasons = [site.reason for _, site in sites(recorder.gm)]
    assert reasons[0] == "refused: its weight is no nn.Parameter"
    assert reasons[1] == "refused: its weight is computed in the graph"
    assert reasons[2] == "`path:*` as nvfp4 W4A16"


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = tiny("llama")
        passes = (TagLinears.of(model), *plan_passes(Policy.of("q", Scheme.of()), "keep"))
        recorder = Recorder(*passes)
        torch.compile(model, backend=recorder)(tokens(), use_cache=False)
    assert "load the model outside" in marks(recorder)["model.layers.0.self_attn.q_proj"].reason
