"""The backend as users meet it: through torch.compile, on every family."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest
import torch
from support.closer import relative_l2
from support.models import BLOCKS, FAMILIES, dequantised, tiny, tokens
from support.nets import net

import fp4graph
from fp4graph import GradientError, OptionError, RefusalError, Report, SelectorError
from fp4graph.packed.cache import CACHE

if TYPE_CHECKING:
    from torch import Tensor, nn


def compiled(model: nn.Module, select: object = "all", **options: object) -> nn.Module:
    options.setdefault("inner", "eager")
    return torch.compile(model, backend=fp4graph.backend(select, **options))  # type: ignore[arg-type]


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(tokens() if ids is None else ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_none_is_bit_identical(family: str) -> None:
    model = tiny(family)
    assert torch.equal(logits(compiled(model, "none")), logits(model))


def test_none_is_bit_identical_to_the_inner_compiler() -> None:
    model = tiny("llama")
    plain = logits(torch.compile(model, backend="eager"))
    torch._dynamo.reset()
    assert torch.equal(logits(compiled(model, "none")), plain)


def check_all(family: str, format: str) -> None:
    model = tiny(family)
    backend = fp4graph.backend("all", format=format, inner="eager")
    out = logits(torch.compile(model, backend=backend))
    assert relative_l2(out, logits(dequantised(model, backend.report, format))) < 1e-5
    assert relative_l2(out, logits(model)) > 1e-2, "FP4 changed nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_equals_the_model_with_dequantised_weights(family: str) -> None:
    check_all(family, "nvfp4")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_all_in_mxfp4(family: str) -> None:
    check_all(family, "mxfp4")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    backend = fp4graph.backend(inner="eager", kernel="reference")
    out = logits(torch.compile(model, backend=backend))
    assert out.dtype == dtype
    assert torch.equal(out, logits(dequantised(model, backend.report)))


def test_unselected_linears_are_bit_identical() -> None:
    model = tiny("llama")
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, out: outputs.__setitem__(name, out))

    first = "model.layers.0.self_attn.q_proj"
    keep(first)
    logits(model)
    dense = outputs.pop(first)
    logits(compiled(model, "blocks=1"))
    assert torch.equal(outputs[first], dense)


@pytest.mark.slow
def test_inductor_none_is_bit_identical_and_all_is_right() -> None:
    model = tiny("qwen2")
    plain = logits(torch.compile(model))
    torch._dynamo.reset()
    assert torch.equal(logits(compiled(model, "none", inner="inductor")), plain)
    backend = fp4graph.backend("all")
    out = logits(torch.compile(model, backend=backend))
    assert relative_l2(out, logits(dequantised(model, backend.report))) < 1e-5


@torch.no_grad()
def test_a_warm_inductor_cache_does_not_serve_another_format_or_other_weights() -> None:
    x = torch.randn(3, 32)
    for format in ("nvfp4", "mxfp4", "nvfp4"):
        for seed in (0, 1):
            for activations in (None, "same"):
                torch._dynamo.reset()
                model = net(1, seed=seed)
                options = {"format": format, "activations": activations}
                expected = compiled(model, "q", **options)(x)
                out = compiled(model, "q", inner="inductor", **options)(x)
                assert relative_l2(out, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_autocast(inner: str) -> None:
    model = tiny("qwen2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backend = fp4graph.backend("all", inner=inner)
        out = logits(torch.compile(model, backend=backend))
        expected = logits(dequantised(model, backend.report))
    assert out.dtype == expected.dtype == torch.bfloat16
    assert relative_l2(out, expected) < (1e-9 if inner == "eager" else 2e-2)


def test_inference_mode_and_no_grad() -> None:
    model = tiny("llama")
    call = compiled(model)
    with torch.inference_mode():
        first = call(tokens(), use_cache=False).logits
    assert torch.equal(logits(call), first)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_call_that_needs_gradients_says_no_grad(inner: str) -> None:
    call = compiled(tiny("llama"), "q", inner=inner)
    for _ in range(2):
        with pytest.raises(GradientError, match=r"torch\.no_grad\(\)"):
            call(tokens(), use_cache=False)


def test_gradients_enabled_without_need_is_fine() -> None:
    model = tiny("llama").requires_grad_(False)
    call = compiled(model, "q")
    assert call(tokens(), use_cache=False).logits.shape == (1, 8, 96)


def test_none_still_trains() -> None:
    model = tiny("llama")
    compiled(model, "none")(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.slow
def test_lengths_and_batches_change() -> None:
    model = tiny("llama")
    backend = fp4graph.backend("all", inner="eager")
    call = torch.compile(model, backend=backend)
    dense = None
    for length, batch in ((16, 1), (17, 1), (40, 2), (1, 1), (5, 3)):
        ids = tokens(length, batch)
        out = logits(call, ids)
        dense = dense or dequantised(model, backend.report)
        assert relative_l2(out, logits(dense, ids)) < 1e-5
    assert backend.report.graphs <= 4
    assert len(backend.report.selected) == BLOCKS * 7


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("how", ["forward", "compile"])
def test_generate(cache: str, how: str) -> None:
    model = tiny("qwen2")
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    backend = fp4graph.backend("all", inner="eager")
    logits(torch.compile(model, backend=backend))
    torch._dynamo.reset()
    expected = dequantised(model, backend.report).generate(tokens(), **options)
    fresh = fp4graph.backend("all", inner="eager")
    if how == "forward":
        model.forward = torch.compile(model.forward, backend=fresh)
    else:
        model.compile(backend=fresh)
    assert model.generate(tokens(), **options).tolist() == expected.tolist()
    assert fresh.report.graphs >= 2
    assert len(fresh.report.selected) == BLOCKS * 7


@torch.no_grad()
def test_thirty_selectors_in_a_row_all_run() -> None:
    model, x = net(2), torch.randn(3, 32)
    plain = model(x)
    seen = []
    for index in range(30):
        role, block = ("q", "o", "up", "down")[index % 4], (index // 4) % 2
        select = f"{role},blocks={block}" + (" | down,blocks=1" if index >= 8 else "")
        backend = fp4graph.backend(select, inner="eager", format="mxfp4" if index % 3 else "nvfp4")
        out = torch.compile(model, backend=backend)(x)
        assert backend.report.selected, select
        assert not torch.equal(out, plain), select
        seen.append(out)
    assert not torch._dynamo.config.fail_on_recompile_limit_hit  # only while a compiled call runs


def test_past_the_recompile_limit_is_an_error_never_the_dense_model() -> None:
    model = tiny("llama")
    call = torch.compile(model, backend=fp4graph.backend("q", inner="eager"), dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        logits(call, tokens(3))
        logits(call, tokens(4))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            logits(call, tokens(5))


def test_entry_point_takes_options() -> None:
    model = tiny("llama")
    expected = logits(compiled(model, "attn", format="mxfp4"))
    torch._dynamo.reset()
    options = {"select": "attn", "format": "mxfp4", "inner": "eager"}
    assert torch.equal(logits(torch.compile(model, backend="fp4graph", options=options)), expected)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"selct": "attn"}, OptionError, "no such option: 'selct'"),
        ({"select": "atn"}, SelectorError, "did you mean 'attn'"),
        ({"format": "fp4"}, OptionError, "formats are"),
    ],
)
def test_entry_point_refuses_what_it_does_not_know(
    options: dict[str, object], error: type[Exception], words: str
) -> None:
    call = torch.compile(tiny("llama"), backend="fp4graph", options=options)
    with pytest.raises(error, match=words):
        logits(call)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"inner": "indcutor"}, "inner='indcutor'"),
        ({"on_refusal": "shrug"}, "on_refusal='shrug'"),
        ({"kernel": "warp"}, "kernels are auto"),
        ({"quantizer": "gptq9"}, "quantizers are rtn"),
        ({"activations": "int8x"}, "activations='int8x'"),
        ({"calibration": 7}, "calibration=7: expected a Calibration"),
        ({"format": "mxfp4:up"}, "formats are"),
    ],
)
def test_bad_options_fail_at_once(options: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        fp4graph.backend("all", **options)  # type: ignore[arg-type]


def test_a_term_that_matches_nothing_raises_at_every_call() -> None:
    call = compiled(tiny("llama"), "attn,blocks>99")
    for _ in range(2):
        with pytest.raises(
            SelectorError, match=r"column 6: `blocks>99` matches nothing.*blocks 0\.\.1"
        ):
            logits(call)


def test_nan_weight_is_refused_by_name() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(fp4graph.WeightError, match=r"model\.layers\.1\.mlp\.up_proj: 1 of 6144"):
        logits(compiled(model, "up"))
    logits(compiled(model, "q"))


def test_a_callable_inner_gets_the_rewritten_graph() -> None:
    counts = []

    def inner(gm: torch.fx.GraphModule, example_inputs: object) -> object:
        counts.append(fp4graph.passes.base.op_counts(gm)["reference_nvfp4.default"])
        return gm.forward

    logits(compiled(tiny("llama"), "q", inner=inner, kernel="reference"))
    assert counts == [BLOCKS]


def test_unknown_keywords_of_torch_compile_are_refused() -> None:
    call = torch.compile(
        tiny("llama"), backend=fp4graph.backend("q"), options={"max_autotune": True}
    )
    with pytest.raises(OptionError, match="max_autotune"):
        logits(call)


def test_report_prints_and_serialises() -> None:
    report = Report()
    logits(compiled(tiny("llama"), "attn,blocks>0", report=report))
    assert len(report) == 15
    assert [row.path.rsplit(".", 1)[1] for row in report.selected] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]
    values = 2 * 64 * 64 + 2 * 32 * 64  # of block 1's attention: 32 bits each, 4.5 in NVFP4
    scales = 4 * 4  # one a tensor
    assert report.bytes_dense - report.bytes_selected == 4 * values - values * 9 // 16 - scales
    rows = [json.loads(line) for line in report.json_lines().splitlines()]
    assert set(rows[0]) == {
        "path", "role", "block", "shape", "selected", "kernel", "reason", "bytes_dense",
        "bytes_packed", "layout", "tile", "why", "stack", "expert", "rows", "merged",
    }  # fmt: skip
    text = str(report)
    assert "model.layers.1.self_attn.q_proj" in text
    assert "4 of 15 linears in FP4" in text


def test_explain_compiles_and_packs_nothing() -> None:
    model = tiny("llama")
    report = fp4graph.explain(model, tokens(), select="attn", format="mxfp4", use_cache=False)
    packed = CACHE._entries.keys()
    assert not any(parameter is weight for parameter in model.parameters() for weight in packed)
    assert {row.kernel for row in report.selected} == {"cpu"}
    assert all("mxfp4 W4A16" in row.reason for row in report.selected)
    refused = fp4graph.explain(model, tokens(), select="q", kernel="triton", use_cache=False)
    assert {row.reason for row in refused if row.role == "q"} == {
        "refused: kernel triton: it runs on cuda and hip, and the weight is on cpu"
    }


def test_passes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fp4graph"):
        logits(compiled(tiny("llama"), "q"))
    assert "linear: 15 -> 13 (-2)" in caplog.text


def test_int8_activations_are_named_with_their_error() -> None:
    model = tiny("llama")
    backend = fp4graph.backend("mlp", activations="int8", inner="eager")
    out = logits(torch.compile(model, backend=backend))
    plain = logits(dequantised(model, backend.report))
    assert 1e-4 < relative_l2(out, plain) < 0.03
    assert "W4A8, activations within 1.5%" in backend.report.selected[0].reason
    with pytest.raises(RefusalError, match="kernel reference: it does not round activations"):
        logits(compiled(model, activations="int8", kernel="reference"))


@pytest.mark.parametrize("family, tied", [("gemma3", True), ("llama", False)])
def test_a_head_that_is_tied_says_what_becomes_of_the_embeddings(family: str, tied: bool) -> None:
    model = tiny(family)
    report = fp4graph.explain(model, tokens(), select="lm_head", use_cache=False)
    (row,) = report.selected
    assert ("the embeddings share its weight" in row.reason) is tied
    embeddings = model.get_input_embeddings().weight.clone()
    (converted,) = fp4graph.convert(model, "lm_head").selected
    assert converted.reason == row.reason
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
