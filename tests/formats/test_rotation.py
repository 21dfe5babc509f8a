"""Rotation of weights and inputs: exact, one node an input, refused where K does not fit."""

from __future__ import annotations

import pytest
import torch
from support.closer import relative_l2
from support.models import tiny, tokens
from support.recorder import Recorder
from torch.nn.functional import linear

import fp4graph
from fp4graph.errors import OptionError, RefusalError, WeightError
from fp4graph.formats import ROTATIONS, rotate
from fp4graph.kernels import ROTATE
from fp4graph.passes.pipeline import plan_passes, rewrite_passes
from fp4graph.passes.tag import TagLinears
from fp4graph.policy import Policy
from fp4graph.quantizers import Quantizer
from fp4graph.scheme import Scheme


@pytest.mark.parametrize("block", ROTATIONS)
def test_is_the_hadamard_matrix_and_its_own_inverse(block: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 2 * block, dtype=torch.float64)
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    h = torch.tensor(signs, dtype=torch.float64) / block**0.5
    expected = torch.cat([x[..., :block] @ h, x[..., block:] @ h], -1)
    assert relative_l2(rotate(x, block), expected) < 1e-14
    assert relative_l2(rotate(rotate(x, block), block), x) < 1e-14
    half = rotate(x.bfloat16(), block)
    assert half.dtype == torch.bfloat16
    assert relative_l2(half, expected) < 1e-2


def test_lets_gradients_pass_and_its_input_be() -> None:
    torch.manual_seed(0)
    x, toward = torch.randn(1, 16, requires_grad=True), torch.randn(1, 16)
    before = x.detach().clone()
    (rotate(x, 16) * toward).sum().backward()
    assert torch.equal(x, before)
    assert x.grad is not None
    assert relative_l2(x.grad, rotate(toward, 16)) < 1e-6  # the matrix is symmetric


@pytest.mark.parametrize("block", ROTATIONS)
def test_without_rounding_a_rotated_linear_is_the_dense_one(block: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(7, 256), torch.randn(9, 256)
    assert relative_l2(linear(rotate(x, block), rotate(w, block)), linear(x, w)) < 1e-6


@pytest.mark.parametrize("quantizer", ["rtn@16", "scale-search@32", "four-over-six@64"])
@torch.no_grad()
def test_equals_rotated_weights_on_rotated_inputs(quantizer: str) -> None:
    model = tiny("llama").requires_grad_(False)
    backend = fp4graph.backend("attn", quantizer=quantizer, inner="eager")
    out = torch.compile(model, backend=backend)(tokens(), use_cache=False).logits
    block = Quantizer.parse(quantizer, fp4graph.NVFP4).rotation
    for row in backend.report.selected:
        w = model.get_submodule(row.path).weight
        packed = fp4graph.quantize(w, "nvfp4", quantizer)
        w.copy_(rotate(packed.dequantize(), block))  # turned back: the same product
    assert relative_l2(out, model(tokens(), use_cache=False).logits) < 5e-6


def test_one_node_a_distinct_input() -> None:
    for activations, rotates, rounds in ((None, 2 * 4, 0), ("same", 0, 2 * 4)):
        policy = Policy.of("all", Scheme.of("mxfp4", "rtn@32", activations, "reference"))
        recorder = Recorder(TagLinears(), *plan_passes(policy, "raise"), *rewrite_passes())
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(tiny("llama"), backend=recorder)(tokens(), use_cache=False)
        assert recorder.after["rotate.default"] == rotates, "q k v, o, gate and up, down"
        assert recorder.after["fake_quantize.default"] == rounds, "it rotates too"


def test_what_does_not_fit() -> None:
    model = tiny("llama")  # K is 64, and 96 for down
    down = torch.compile(model, backend=fp4graph.backend("down", quantizer="rtn@64"))
    words = r"down_proj: K=96 is no multiple of the rotation's 64"
    with torch.no_grad(), pytest.raises(RefusalError, match=words):
        down(tokens(), use_cache=False)
    with pytest.raises(WeightError, match="K=40 is no multiple"):
        fp4graph.quantize(torch.randn(4, 40), "nvfp4", "rtn@16")
    with pytest.raises(OptionError, match=r"rotations are rtn@16, rtn@32, rtn@64, rtn@128"):
        fp4graph.backend(quantizer="rtn@8")
    torch._dynamo.reset()
    part = torch.compile(tiny("gpt2"), backend=fp4graph.backend("v", quantizer="rtn@16"))
    with torch.no_grad(), pytest.raises(RefusalError, match="only a part of it is selected"):
        part(tokens(), use_cache=False)


def test_names() -> None:
    parse = Quantizer.parse
    assert parse("mr-gptq", fp4graph.NVFP4) == Quantizer("gptq", "scale-search", 16, 0.0, "")
    assert parse("mr-gptq", fp4graph.MXFP4) == Quantizer("gptq", "rtn", 32, 0.0, "")
    assert parse("mr-gptq@128", fp4graph.MXFP4) == Quantizer("gptq", "rtn", 128, 0.0, "")
    assert parse("rtn", fp4graph.MXFP4) == Quantizer("rtn", "rtn", 0, 0.0, "")
    for bad in ("rtn@", "@16", "gptq:magic", "RTN", ""):
        with pytest.raises(OptionError, match="unknown quantizer"):
            parse(bad, fp4graph.NVFP4)


def test_the_op() -> None:
    torch.library.opcheck(ROTATE, (torch.randn(3, 64), 32))
    assert ROTATE(torch.randn(0, 64), 32).shape == (0, 64)
