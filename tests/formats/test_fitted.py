"""The study's format: MXFP4 with 256 scales fitted to each tensor."""

from __future__ import annotations

import pytest
import torch
from support.closer import relative_l2
from support.models import tiny, tokens

import fp4graph
from fp4graph.errors import OptionError, RefusalError
from fp4graph.formats import MXFP4, MXFP4_FITTED, get_format, rotate


def test_scales_are_spaced_evenly_from_the_smallest_to_the_largest() -> None:
    codec = MXFP4_FITTED.scale_codec
    amax = 6 * 2.0 ** torch.tensor([-3.0, -2.99, 0.0, 2.1])
    codes, both = codec.encode(amax)
    assert both.tolist() == pytest.approx([-3, 5.1 / 255])
    assert codes.tolist() == [0, 0, 150, 255]
    assert codec.decode(codes, both).log2().tolist() == pytest.approx([-3, -3, 0, 2.1], abs=0.011)
    zeros, both = codec.encode(torch.zeros(3))
    assert zeros.tolist() == [0, 0, 0]
    assert both.isfinite().all()


def test_errs_less_than_powers_of_two() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 200) * torch.rand(64, 1).exp2()
    w[3] = 0
    packed = fp4graph.quantize(w, "mxfp4-fitted")
    assert packed.format is get_format("mxfp4-fitted")
    assert packed.nbytes == MXFP4_FITTED.packed_bytes(64, 200)
    assert not packed.dequantize()[3].any()
    nearest = relative_l2(fp4graph.quantize(w, "mxfp4:even").dequantize(), w)
    assert relative_l2(packed.dequantize(), w) < 0.95 * nearest
    same = torch.full((2, 64), -3.0)
    assert torch.equal(fp4graph.quantize(same, "mxfp4-fitted").dequantize(), same)


@pytest.mark.parametrize("activations", [None, "same"])
@torch.no_grad()
def test_runs_by_its_meaning_alone(activations: str | None) -> None:
    model = tiny("llama").requires_grad_(False)
    backend = fp4graph.backend(
        "mlp", format="mxfp4-fitted", activations=activations, quantizer="rtn@32", inner="eager"
    )
    out = torch.compile(model, backend=backend)(tokens(), use_cache=False).logits
    assert {row.kernel for row in backend.report.selected} == {"dequantized"}
    for row in backend.report.selected:
        module = model.get_submodule(row.path)
        packed = fp4graph.quantize(module.weight, "mxfp4-fitted", "rtn@32")
        module.weight.copy_(packed.dequantize())

        def turn(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            x = rotate(args[0], 32)
            return (MXFP4_FITTED.fake_quantize(x) if activations else x,)

        module.register_forward_pre_hook(turn)
    assert relative_l2(out, model(tokens(), use_cache=False).logits) < 1e-5
    torch._dynamo.reset()
    native = torch.compile(
        tiny("llama"), backend=fp4graph.backend("mlp", format="mxfp4-fitted", kernel="cpu")
    )
    with pytest.raises(RefusalError, match="kernel cpu: it does not read mxfp4-fitted"):
        native(tokens(), use_cache=False)


def test_what_searches_scales_has_none_to_search() -> None:
    with pytest.raises(OptionError, match="searches scales, and mxfp4-fitted fits them"):
        fp4graph.backend(format="mxfp4-fitted", quantizer="four-over-six")
    with pytest.raises(OptionError, match=r"formats are nvfp4, mxfp4, .*, mxfp4-fitted"):
        get_format("mxfp4-dagger")
    assert MXFP4.name == "mxfp4"
