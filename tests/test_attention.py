"""Attention of few tokens: within float rounding of float64, and in models what SDPA gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.closer import relative_l2
from support.experts import gpt_oss
from support.models import tiny, tokens
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import StaticCache

import fp4graph
from fp4graph import OptionError, RefusalError, attention
from fp4graph.attention import attending
from fp4graph.kernels.cpu.library import Missing, load

load()
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.2e-3, torch.float16: 2.8e-4}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.ops.fp4graph.cpu_attend(q, k, v, mask, q.shape[-1] ** -0.5).transpose(1, 2)


def wide(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    k, v = (each.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    return scaled_dot_product_attention(q.double(), k, v, attn_mask=mask)


def draw(B: int, H: int, heads: int, M: int, S: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(B, M, H, D).to(dtype).transpose(1, 2)
    return [q, *(torch.randn(B, heads, S, D).to(dtype) for _ in "kv")]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 14, 2, 1, 560, 64), (2, 9, 3, 1, 37, 64), (1, 4, 4, 8, 300, 80), (2, 3, 3, 2, 5, 17)],
)
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_as_close_as_its_dtype_allows(shape: Any, dtype: torch.dtype, kind: str) -> None:
    q, k, v = draw(*shape, dtype)
    B, _, _, M, S, _ = shape
    mask = None
    if kind != "none":
        mask = torch.rand(B, 1, M, S) < 0.7
        mask[..., 0] = True
        mask = mask if kind == "bool" else torch.where(mask, 0.0, -100.0).to(dtype)
    assert relative_l2(attend(q, k, v, mask), wide(q, k, v, mask)) < BOUNDS[dtype]


def test_parts_of_a_larger_cache_and_wide_scores() -> None:
    q, k, v = draw(1, 4, 2, 1, 64, 32, torch.float32)
    k, v = k[:, :, 3:50], v[:, :, 3:50]
    assert relative_l2(attend(q * 60, k, v), wide(q * 60, k, v)) < 2e-5


def test_nan_stays_and_nothing_seen_is_zero() -> None:
    q, k, v = draw(1, 2, 1, 1, 40, 16, torch.float32)
    v[0, 0, 7, 3] = torch.nan
    assert attend(q, k, v).isnan().sum() == 2  # of both heads that one value
    seen = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    assert torch.equal(attend(q, k, v, seen), torch.zeros(1, 2, 1, 16))
    k[0, 0, 5] = torch.nan
    assert attend(q, k, v).isnan().all()


def test_opcheck_and_misfits() -> None:
    q, k, v = draw(1, 4, 2, 1, 24, 16, torch.bfloat16)
    mask = torch.ones(1, 1, 1, 24, dtype=torch.bool)
    torch.library.opcheck(torch.ops.fp4graph.cpu_attend.default, (q, k, v, mask, 0.25))
    for wrong in (
        (q, k, v[:, :, :9]),
        (q[:, :3], k, v),
        (q, k.float(), v),
        (q, k, v, mask[..., 1:]),
    ):
        with pytest.raises(RuntimeError):
            attend(*wrong)


class Seen:
    """An inner compiler that runs graphs as they are, and says which attention they have."""

    def __init__(self) -> None:
        self.ours: list[bool] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        self.ours.append(any("cpu_attend" in str(node.target) for node in gm.graph.nodes))
        return gm.forward


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@torch.no_grad()
def test_a_model_generates_what_it_does_by_sdpa(family: str) -> None:
    model = tiny(family).requires_grad_(False)
    prompt = tokens(9)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    want = model.generate(prompt, **options)
    wanted = model(prompt).logits
    fp4graph.set_attention(model)
    assert torch.equal(model.generate(prompt, **options), want)
    assert torch.equal(model(prompt).logits, wanted)  # many tokens: it is SDPA
    seen, cache = Seen(), StaticCache(config=model.config, max_cache_len=20)
    torch._dynamo.reset()
    run = torch.compile(model, backend=seen, fullgraph=True, dynamic=False)
    run(prompt, past_key_values=cache)
    run(want[:, 9:10], past_key_values=cache)
    assert seen.ours == [False, True]


def test_with_gradients_it_is_sdpa() -> None:
    model = tiny("llama")
    fp4graph.set_attention(model)
    model(tokens(1)).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@torch.no_grad()
def test_a_model_with_sinks_is_refused_and_left_as_it_was() -> None:
    """SDPA does not know them: its results would be others, without a word."""
    model, ids = gpt_oss().requires_grad_(False), tokens(5)
    before = model(ids).logits
    with pytest.raises(RefusalError, match="GptOssForCausalLM cannot attend"):
        fp4graph.set_attention(model)
    assert torch.equal(model(ids).logits, before)
    with (
        pytest.raises(OptionError, match="attention='fp4graph': GptOss"),
        attending(model, "fp4graph"),
    ):
        pass


def test_without_kernels_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "load", lambda: Missing("no compiler"))
    with pytest.raises(RefusalError, match="no compiler"):
        fp4graph.set_attention(tiny("llama"))


@torch.no_grad()
def test_the_recipe_of_the_page_on_speed() -> None:
    model = tiny("qwen2").requires_grad_(False)
    fp4graph.convert(model, "all | lm_head", format="mxfp4")
    prompt = tokens(9)
    want = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    fp4graph.set_attention(model)
    guards = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    torch._dynamo.reset()
    step = torch.compile(
        model.forward,
        backend=fp4graph.backend("none", inner="eager"),
        dynamic=False,
        options={"guard_filter_fn": guards},
    )
    cache, ids, found = StaticCache(config=model.config, max_cache_len=16), prompt, []
    for _ in range(6):
        ids = step(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        found.append(int(ids))
    assert found == want[0, 9:].tolist()
