"""W4A4 and W8A8 by torch's `scaled_mm`: rounding, layout, and the product where a CPU has it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.closer import relative_l2
from support.models import tiny, tokens
from torch.nn import functional
from torch.nn.functional import linear

import fp4graph
from fp4graph.formats import FORMATS, FP8, NVFP4, BlockFormat
from fp4graph.formats.minifloat import E2M1, E4M3
from fp4graph.kernels import Problem, choose, parse_target, refusals, registry
from fp4graph.kernels.scaled_mm import SCALED_MM, rounded, tiled, untiled

pytest.importorskip("triton")

from kernels.offline import Catch, facts
from kernels.triton_interpreter import interpret

from fp4graph.kernels.triton import rounding

if TYPE_CHECKING:
    from torch import Tensor

BLACKWELL = "cuda:sm_100"
SCALED = functional.scaled_mm


def problem(
    format: BlockFormat, target: str = BLACKWELL, n: int = 64, k: int = 128, **more: Any
) -> Problem:
    given = {"inputs": "same", "dtype": torch.bfloat16, **more}
    return Problem(n, k, format, target=parse_target(target), **given)


def rows(m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of many sizes, with zeros, subnormal numbers, ties, and the dtype's largest."""
    generator = torch.Generator().manual_seed(m + k)
    x = torch.randn(m, k, generator=generator)
    x *= torch.logspace(-30, 3, m)[:, None] if m > 2 else 1
    x[:, : k // 4] = (x[:, : k // 4] * 4).round() / 4
    x[0] = 0
    x[-1, :16] = torch.linspace(-6, 6, 16)
    return x.to(dtype)


@pytest.mark.proof("triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("m, k", [(1, 32), (5, 96), (130, 96), (2, 2080)])
def test_kernels_round_as_the_format_says(m: int, k: int, dtype: torch.dtype) -> None:
    x = rows(m, k, dtype)
    for spoilt in (
        x,
        x.index_fill(1, torch.tensor(17), math.nan),
        x.index_fill(0, torch.tensor(0), math.inf),
    ):
        expected = NVFP4.quantize_rows(spoilt)
        qdata, scale, top = rounding.nvfp4(spoilt, run=interpret)
        assert torch.equal(top, expected.per_tensor_scale.view(1))
        assert torch.equal(scale, tiled(expected.scale_codes))
        good = expected.scale_codes.ne(0x7F).repeat_interleave(8, 1)
        assert torch.equal(qdata * good, expected.qdata * good)
        expected = FP8.quantize_rows(spoilt)
        codes, scale = rounding.fp8(spoilt, run=interpret)
        assert torch.equal(scale.nan_to_num(-1), expected.scale.nan_to_num(-1))
        good = expected.scale.isfinite()
        assert torch.equal(codes * good, expected.qdata * good)


@pytest.mark.proof("triton")
def test_kernels_encode_every_tie() -> None:
    """All values half way between codes, and their neighbours, under a scale of 1."""
    for minifloat, most in ((E2M1, 6.0), (E4M3, 448.0)):
        values = minifloat.table(torch.device("cpu"))
        values = values[values >= 0].sort().values
        middle = (values[1:] + values[:-1]) / 2
        near = [
            middle,
            middle.nextafter(torch.tensor(0.0)),
            middle.nextafter(torch.tensor(1e9)),
            values,
        ]
        x = torch.cat([*near, *(-each for each in near)])
        x = torch.cat((x, x.new_zeros(-len(x) % 32)))
        if minifloat is E2M1:
            groups = x.view(-1, 2, 8)  # room for what makes the scales 1
            x = torch.cat(
                (torch.full_like(groups[..., :1], most * 448), groups[..., :7].clamp(-6, 6)), -1
            )
            x = torch.cat((x, x), -1).flatten()[None]
            expected = NVFP4.quantize_rows(x)
            assert torch.equal(rounding.nvfp4(x, run=interpret)[0], expected.qdata)
        else:
            x = torch.cat((x, x.new_full((32,), most)))[None]
            assert FP8.quantize_rows(x).scale.item() == 1
            assert torch.equal(rounding.fp8(x, run=interpret)[0], FP8.quantize_rows(x).qdata)


@pytest.mark.proof("triton")
@pytest.mark.parametrize("target", ["cuda:sm_90", BLACKWELL, "cuda:sm_120"])
def test_kernels_compile_without_spills(target: str) -> None:
    catch = Catch()
    x = torch.zeros(40, 4096, dtype=torch.bfloat16)
    rounding.nvfp4(x, run=catch)
    rounding.fp8(x, run=catch)
    assert len(catch.launches) == 3
    for each in catch.launches:
        found = facts(each.compile(parse_target(target)), parse_target(target))
        assert found.spilled == 0
        assert found.count(r"ld\.global\.v[24]\.b32") > 0, "loads of single activations"
        assert not found.count(r"div\.(full|approx)"), "a division that is not rounded right"


@pytest.mark.parametrize("r, groups", [(1, 1), (128, 4), (130, 9), (300, 66)])
def test_scales_lie_as_tensor_cores_read_them(r: int, groups: int) -> None:
    from torchao.prototype.mx_formats.utils import to_blocked

    scale = torch.randint(0, 127, (r, groups), dtype=torch.uint8)
    assert torch.equal(tiled(scale), to_blocked(scale, use_triton_kernel=False).flatten())
    assert torch.equal(untiled(tiled(scale), r, groups), scale)


def stand_in(
    a: Tensor, b: Tensor, scale_a: list[Tensor], recipe_a: list[Any], scale_b: list[Tensor],
    recipe_b: list[Any], swizzle_a: list[Any], swizzle_b: list[Any], bias: Tensor | None,
    output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Torch's product: FP8 its own, NVFP4 as its checks and documentation have it, in float64."""
    if a.dtype == torch.float8_e4m3fn:
        return SCALED(a, b, scale_a, recipe_a, scale_b, recipe_b, None, None, bias, output_dtype)
    recipe, order = functional.ScalingType, functional.SwizzleType
    assert recipe_a == recipe_b == [recipe.BlockWise1x16, recipe.TensorWise]
    assert swizzle_a == swizzle_b == [order.SWIZZLE_32_4_4, order.NO_SWIZZLE]

    def side(codes: Tensor, scales: list[Tensor]) -> Tensor:
        size, k = codes.shape[0], codes.shape[1] * 2
        assert codes.dtype == torch.float4_e2m1fn_x2
        assert codes.is_contiguous()
        assert scales[0].dtype == torch.float8_e4m3fn
        assert scales[0].numel() == -(-size // 128) * 128 * (-(-k // 64) * 4)
        assert scales[1].shape == (1,)
        byte = codes.view(torch.uint8)
        values = E2M1.decode(torch.stack((byte & 15, byte >> 4), -1).flatten(1)).double()
        by_group = untiled(scales[0].view(torch.uint8), size, k // 16).view(torch.float8_e4m3fn)
        return values * by_group.double().repeat_interleave(16, 1) * scales[1].double()

    y = side(a, scale_a) @ side(b.t(), scale_b).T
    return (y if bias is None else y + bias.double()).to(output_dtype)


@pytest.mark.parametrize("format", [NVFP4, FP8], ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 70), (0,)])
def test_is_the_emulated_product_within_rounding(
    format: BlockFormat, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "scaled_mm", stand_in)
    generator = torch.Generator().manual_seed(len(shape))
    sizes = (64, 32, 96)
    weights = [fp4graph.quantize(torch.randn(n, 192, generator=generator), format) for n in sizes]
    x = torch.randn(*shape, 192, generator=generator).bfloat16()
    biases = [torch.randn(64, generator=generator).bfloat16(), None, None]
    op = SCALED_MM.same_ops[format.base]
    packed = [
        SCALED_MM.prepack(w, problem(format, n=n, k=192))
        for w, n in zip(weights, sizes, strict=True)
    ]
    found = [op(x, *each, bias) for each, bias in zip(packed, biases, strict=True)]
    taken = format.fake_quantize(x.float()).double()
    for y, w, bias in zip(found, weights, biases, strict=True):
        exact = linear(taken, w.dequantize(torch.float64), None if bias is None else bias.double())
        assert y.shape == exact.shape
        assert y.dtype == torch.bfloat16
        assert not y.numel() or relative_l2(y, exact) < 2.0**-8
    joined = SCALED_MM.merged[op](x, *map(list, zip(*packed, strict=True)), biases)
    for one, again in zip(found, joined, strict=True):
        assert torch.equal(one, again)


@pytest.mark.parametrize("format", [NVFP4, FP8], ids=str)
def test_nan_stays_in_its_row(format: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "scaled_mm", stand_in)
    packed = SCALED_MM.prepack(fp4graph.quantize(torch.randn(64, 128), format), problem(format))
    x = torch.randn(3, 128).bfloat16()
    op = SCALED_MM.same_ops[format.base]
    clean = op(x, *packed, None)
    x[1, 5] = math.nan
    y = op(x, *packed, None)
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()
    assert relative_l2(y[::2], clean[::2].double()) < 0.2  # NVFP4's per-tensor scale may change


@pytest.mark.parametrize("format", [NVFP4, FP8], ids=str)
def test_gives_packed_weights_back(format: BlockFormat) -> None:
    w = fp4graph.quantize(torch.randn(96, 160), format)
    asked = problem(format, n=96, k=160)
    again = SCALED_MM.unpack(SCALED_MM.prepack(w, asked), asked, w.per_tensor_scale)
    assert torch.equal(again.qdata, w.qdata)
    assert torch.equal(again.dequantize(), w.dequantize())


def test_rounds_on_this_cpu_as_the_format_says() -> None:
    x = rows(9, 96)
    expected = NVFP4.quantize_rows(x)
    qdata, scale, top = rounded(x, NVFP4)
    assert torch.equal(qdata, expected.qdata)
    assert torch.equal(untiled(scale, 9, 6), expected.scale_codes)
    assert top.item() == expected.per_tensor_scale
    for format in (NVFP4, FP8):
        assert torch.equal(format.quantize_rows(x).dequantize(), format.fake_quantize(x.float()))


@pytest.mark.parametrize(
    "asked, kernel",
    [
        (problem(NVFP4), "scaled_mm"),
        (problem(NVFP4, "cuda:sm_120"), "scaled_mm"),
        (problem(FP8), "scaled_mm"),
        (problem(FP8, "cuda:sm_90"), "scaled_mm"),
        (problem(NVFP4, "cuda:sm_90"), "triton_fragments"),
        (problem(FP8, "cuda:sm_80"), "triton"),
        (problem(FORMATS["mxfp4"]), "triton_fragments"),
        (problem(NVFP4, inputs="exact"), "triton_fragments"),
        (problem(NVFP4, k=112), "triton_fragments"),
        (problem(NVFP4, experts=4), "triton_fragments"),
        (problem(NVFP4, dtype=torch.float16), "triton_fragments"),
        (problem(NVFP4, "cpu"), "cpu"),
    ],
)
def test_who_computes(asked: Problem, kernel: str) -> None:
    found = choose(asked)
    assert found.name == kernel
    assert found.rounds(asked) == (kernel == "scaled_mm")
    assert found.op_for(asked).name().startswith(f"fp4graph::{kernel}")


@pytest.mark.parametrize("format, most", [("fp8", 0.1), ("nvfp4", 0.4)])
@torch.no_grad()
def test_a_model_rounds_each_input_once(
    format: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel as if this CPU had it: torch multiplies FP8 here, and NVFP4 by the stand-in."""
    monkeypatch.setattr(functional, "scaled_mm", stand_in)
    model = tiny("llama").bfloat16()
    ids = tokens()

    def run() -> tuple[Tensor, fp4graph.Report, list[str]]:
        torch._dynamo.reset()
        report, seen = fp4graph.Report(), []

        def inner(gm: torch.fx.GraphModule, _: Any) -> Any:
            seen.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
            return gm

        backend = fp4graph.backend(
            "all", format=format, activations="same", inner=inner, report=report, model=model
        )
        return torch.compile(model, backend=backend)(ids).logits, report, seen

    emulated, report, seen = run()
    assert all("emulated" in row.reason for row in report.selected)
    assert any("fake_quantize" in each for each in seen)
    here = replace(SCALED_MM, backends=(), refuses=lambda _: None)
    monkeypatch.setattr(registry, "KERNELS", (here, *registry.KERNELS))
    found, report, seen = run()
    assert {row.kernel for row in report.selected} == {"scaled_mm"}
    assert not any("emulated" in row.reason for row in report.selected)
    assert not any("fake_quantize" in each for each in seen)
    assert {row.role for row in report.selected if row.merged} == {"q", "k", "v", "gate", "up"}
    assert relative_l2(found, emulated.double()) < most  # codes flip where inputs differ by a bit


def test_refusals_say_why() -> None:
    for asked, reason in (
        (problem(NVFP4, inputs="exact"), "as activations='same' asks for"),
        (problem(NVFP4, "cuda:sm_90"), "tensor cores take nvfp4 from sm_100 on"),
        (problem(FP8, n=40), "multiples of 16"),
        (problem(NVFP4, experts=2), "experts"),
        (problem(FORMATS["mxfp4"]), "does not read mxfp4"),
    ):
        assert reason in refusals(asked, [SCALED_MM])[0]
