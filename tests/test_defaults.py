"""Nothing hangs on torch's default dtype or device, which programs set for models of their own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch
from support.calibration import BATCHES, logits
from support.models import byte_tokenizer, tiny

import fp4graph
from fp4graph import NVFP4, Activations, Scheme
from fp4graph.fingerprint import fingerprint
from fp4graph.models import LoadedModel
from fp4graph.quantizers import DATA_FREE, Quantizer
from fp4graph.study.evaluate import Windows
from fp4graph.study.outliers import outliers
from fp4graph.study.sensitivity import Sensitivity

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


EVERY = [(torch.bfloat16, "cpu"), (torch.float64, "meta")]


@pytest.mark.parametrize("dtype, device", EVERY)
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "mxfp4:rceil", "mxfp4-fitted"])
@pytest.mark.parametrize("quantizer", [*DATA_FREE, "rtn@16"])
def test_codes(dtype: torch.dtype, device: str, format: str, quantizer: str) -> None:
    try:
        Quantizer.parse(quantizer, fp4graph.get_format(format))
    except fp4graph.OptionError:
        pytest.skip("not for this format")
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    expected = fp4graph.quantize(weight, format, quantizer)
    with defaults(dtype, device):
        found = fp4graph.quantize(weight, format, quantizer)
        values = found.dequantize()
    assert torch.equal(found.qdata, expected.qdata)
    assert torch.equal(found.scale.view(torch.uint8), expected.scale.view(torch.uint8))
    assert torch.equal(values, expected.dequantize())


@pytest.mark.parametrize(
    "quantizer", ["gptq", "weighted-scale-search", "learned", "gptq:scale-search@16", "gptq+smooth"]
)
def test_calibrated_codes(quantizer: str) -> None:
    model = tiny("llama")

    def run() -> str:
        torch._dynamo.reset()
        found = fp4graph.calibrate(model, BATCHES[:2], "blocks=1", quantizer=quantizer)
        return found.digest()

    expected = run()
    for each in EVERY:
        with defaults(*each):
            assert run() == expected, each


@pytest.mark.parametrize("activations", [None, "same", "int8", "auto"])
def test_a_compiled_model(activations: str | None) -> None:
    model = tiny("llama")

    def run() -> torch.Tensor:
        torch._dynamo.reset()
        backend = fp4graph.backend("all", activations=activations, inner="eager")
        return logits(torch.compile(model, backend=backend))

    expected = run()
    for each in EVERY:
        with defaults(*each):
            found = run()
        assert torch.equal(found, expected), each


def test_scores() -> None:
    loaded = LoadedModel("tiny", tiny("llama"), byte_tokenizer())
    windows = Windows(BATCHES[0], 1)

    def run() -> tuple[object, ...]:
        torch._dynamo.reset()
        schemes = [Scheme(NVFP4), Scheme(NVFP4, activations=Activations.SAME)]
        scores = Sensitivity(loaded, windows, schemes)
        products = [fingerprint(p) for each in scores.products.values() for p in each.values()]
        return scores.rows, products, list(outliers(loaded, windows, lambda: None).values())

    expected = run()
    for each in EVERY:
        with defaults(*each):
            found = run()
        assert found == expected, each
