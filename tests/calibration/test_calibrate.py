"""Calibrating a whole model: block by block, to be gone on with, for the backend."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.calibration import BATCHES, TEST, logits
from support.closer import relative_l2
from support.models import tiny, tokens
from torch import nn

import fp4graph
from fp4graph.errors import CalibrationError, OptionError, SelectorError
from fp4graph.formats import rotate
from fp4graph.mapped import MappedFile
from fp4graph.quantizers import Hessian, gptq, output_error

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fp4graph import Calibration


def rounded(model: nn.Module, calibration: Calibration) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for fqn, packed in calibration.packed.items():
            module = twin.get_submodule(fqn)
            w = packed.dequantize()
            module.weight.copy_(w.T if type(module).__name__ == "Conv1D" else w)
    return twin


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_the_backend_runs_what_was_found(family: str, format: str, tmp_path: Path) -> None:
    model = tiny(family)
    found = fp4graph.calibrate(
        model, BATCHES, format=format, quantizer="gptq:scale-search", out=tmp_path / "c.safetensors"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    linears = {row.path for row in fp4graph.explain(model, TEST, use_cache=False).selected}
    assert set(found.packed) == linears
    for given in (found, tmp_path / "c.safetensors", str(tmp_path / "c.safetensors")):
        torch._dynamo.reset()
        backend = fp4graph.backend(format=format, calibration=given, inner="eager")
        out = logits(torch.compile(model, backend=backend))
        assert relative_l2(out, logits(rounded(model, found))) < 2e-6
    assert f"{format} W4A16, gptq:scale-search" in backend.report.selected[0].reason
    nearest = fp4graph.backend(format=format, inner="eager")
    torch._dynamo.reset()
    plain = logits(torch.compile(model, backend=nearest))
    assert relative_l2(out, logits(model)) < relative_l2(plain, logits(model))


@pytest.mark.parametrize("quantizer", ["gptq", "distilled"])
def test_values_between_blocks_may_lie_in_files(
    quantizer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny("llama")
    found = fp4graph.calibrate(model, BATCHES, "mlp", quantizer=quantizer)
    monkeypatch.setenv("FP4GRAPH_CACHE", str(tmp_path))
    monkeypatch.setattr("fp4graph.calibration.blocks.fits", lambda *_: False)
    kept: list[int] = []
    keep = MappedFile.keep
    monkeypatch.setattr(
        MappedFile, "keep", lambda self, each: (kept.append(each.nbytes), keep(self, each))[1]
    )
    torch._dynamo.reset()
    again = fp4graph.calibrate(model, BATCHES, "mlp", quantizer=quantizer)
    assert again.digest() == found.digest()
    residual = BATCHES[0].numel() * 64 * 4
    assert kept.count(residual) >= len(BATCHES) * (2 if quantizer == "distilled" else 1)


def inputs_of(model: nn.Module, name: str) -> Tensor:
    """Return the Hessian of a linear's input on the batches, by a hook."""
    module = model.get_submodule(name)
    hessian = Hessian(module.weight.shape[1])
    with module.register_forward_pre_hook(lambda _, args: hessian.add(args[0])), torch.no_grad():
        for batch in BATCHES:
            model(batch, use_cache=False)
    return hessian.mean


def test_a_block_sees_what_the_rounded_blocks_before_it_give() -> None:
    model = tiny("llama")
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight
    for propagate in (True, False):
        found = fp4graph.calibrate(model, BATCHES, "all", propagate=propagate)
        first = [fqn for fqn in found.packed if ".0." in fqn]
        before = copy.copy(found)
        object.__setattr__(before, "packed", {fqn: found.packed[fqn] for fqn in first})
        seen = inputs_of(rounded(model, before) if propagate else model, name)
        alone = gptq(weight.detach(), seen, fp4graph.quantize(weight))
        same = (alone.qdata == found.packed[name].qdata).double().mean()
        assert same > 0.999, "but for rounding of sums"


@pytest.mark.parametrize("quantizer", ["gptq:scale-search", "learned"])
def test_a_part_of_a_fused_weight(quantizer: str) -> None:
    model = tiny("gpt2").requires_grad_(False)
    found = fp4graph.calibrate(model, BATCHES, "v,mlp", quantizer=quantizer)
    twin = rounded(model, found)
    for old, new in zip(model.transformer.h, twin.transformer.h, strict=True):
        width = new.attn.c_attn.weight.shape[0]
        new.attn.c_attn.weight[:, : 2 * width] = old.attn.c_attn.weight[:, : 2 * width]
    backend = fp4graph.backend("v,mlp", calibration=found, inner="eager")
    assert relative_l2(logits(torch.compile(model, backend=backend)), logits(twin)) < 2e-6
    if quantizer == "learned":
        return
    name = "transformer.h.1.mlp.c_proj"  # sees what v alone, and mlp, in FP4 before it give
    alone = fp4graph.calibrate(twin, BATCHES, "blocks=1&mlp", quantizer=quantizer, propagate=False)
    same = (alone.packed[name].qdata == found.packed[name].qdata).double().mean()
    assert same > 0.9


def test_every_linear_errs_less_on_what_it_saw() -> None:
    model = tiny("llama")
    found = fp4graph.calibrate(model, BATCHES, format="mxfp4", propagate=False)
    for fqn, packed in found.packed.items():
        weight = model.get_submodule(fqn).weight.detach()
        hessian = inputs_of(model, fqn)
        nearest = fp4graph.quantize(weight, "mxfp4").dequantize()
        assert output_error(weight, packed.dequantize(), hessian) < output_error(
            weight, nearest, hessian
        )


def test_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tiny("llama"), tmp_path / "c.safetensors"
    whole = fp4graph.calibrate(model, BATCHES)

    def kill(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fp4graph.calibrate(model, BATCHES, out=out, progress=kill)
    assert list((tmp_path / "c.safetensors.blocks").glob("*/0.safetensors"))
    solved: list[str] = []

    def counting(*args: object, name: str, **options: object) -> object:
        solved.append(name)
        return gptq(*args, name=name, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("fp4graph.calibration.codes.gptq", counting)
    found = fp4graph.calibrate(model, BATCHES, out=out)
    assert len(solved) == 7
    assert all(".layers.1." in name for name in solved), "the first block was not done again"
    assert not (tmp_path / "c.safetensors.blocks").exists()
    assert all(torch.equal(found.packed[f].qdata, whole.packed[f].qdata) for f in whole.packed)
    with pytest.raises(KeyboardInterrupt):
        fp4graph.calibrate(model, BATCHES, out=out, progress=kill)
    other = fp4graph.calibrate(model, BATCHES[1:], out=out)  # others' blocks are not taken
    fresh = fp4graph.calibrate(model, BATCHES[1:])
    assert all(torch.equal(other.packed[f].qdata, fresh.packed[f].qdata) for f in fresh.packed)


@pytest.mark.parametrize("mode", [None, "same"])
@pytest.mark.parametrize("quantizer", ["mr-gptq", "weighted-scale-search@32"])
def test_rotated_codes_run_on_rotated_inputs(mode: str | None, quantizer: str) -> None:
    model = tiny("llama")
    found = fp4graph.calibrate(model, BATCHES, format="mxfp4", quantizer=quantizer)
    backend = fp4graph.backend(
        format="mxfp4", calibration=found, activations=mode, inner="eager", kernel="reference"
    )
    out = logits(torch.compile(model, backend=backend))
    twin = rounded(model, found)  # weights rotated, so inputs must be

    def turn(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = rotate(args[0], 32)
        return (x if mode is None else fp4graph.MXFP4.fake_quantize(x),)

    for fqn in found.packed:
        twin.get_submodule(fqn).register_forward_pre_hook(turn)
    assert relative_l2(out, logits(twin)) < (2e-6 if mode is None else 2e-2)
    assert f"{'W4A4' if mode else 'W4A16'}, {quantizer}" in backend.report.selected[0].reason


def test_a_weight_that_was_not_calibrated_is_an_error() -> None:
    model = tiny("llama")
    found = fp4graph.calibrate(model, BATCHES, "attn")
    backend = fp4graph.backend("attn | down", calibration=found, inner="eager")
    with pytest.raises(fp4graph.RefusalError, match=r"no codes for .*down_proj: it was made with"):
        logits(torch.compile(model, backend=backend))
    torch._dynamo.reset()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.1)
    backend = fp4graph.backend("attn", calibration=found, inner="eager")
    with pytest.raises(CalibrationError, match=r"layers\.1\.self_attn\.q_proj: its values are not"):
        logits(torch.compile(model, backend=backend))


def test_a_nan_is_refused_by_name() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(fp4graph.WeightError, match=r"layers\.1\.mlp\.up_proj: 1 of 6144"):
        fp4graph.calibrate(model, BATCHES)


def test_a_model_that_writes_in_place_is_run_as_it_is() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            h = self.up_proj(x)
            h.mul_(h.sigmoid())  # whose result nobody takes
            h[..., 0] = 2.0
            return x + self.down_proj(h)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model, x = Model().requires_grad_(False), torch.randn(64, 32)
    found = fp4graph.calibrate(model, [{"x": x}])
    twin = copy.deepcopy(model)
    seen = Hessian(64)
    for name in ("up_proj", "down_proj"):
        getattr(twin.layers[0], name).weight.copy_(found.packed[f"layers.0.{name}"].dequantize())
    twin.layers[1].down_proj.register_forward_pre_hook(lambda _, args: seen.add(args[0]))
    twin(x)
    w = model.layers[1].down_proj.weight
    alone = gptq(w, seen.mean, fp4graph.quantize(w))
    assert torch.equal(alone.qdata, found.packed["layers.1.down_proj"].qdata)


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(OptionError, match="needs no data: expected weighted-scale-search"):
        fp4graph.calibrate(model, BATCHES, quantizer="rtn")
    with pytest.raises(OptionError, match="is for nvfp4"):
        fp4graph.calibrate(model, BATCHES, quantizer="gptq:four-over-six", format="mxfp4")
    with pytest.raises(SelectorError, match="matches nothing"):
        fp4graph.calibrate(model, BATCHES, "blocks>9")
    with pytest.raises(CalibrationError, match="no batches"):
        fp4graph.calibrate(model, [])
    with pytest.raises(CalibrationError, match="batches of one shape"):
        fp4graph.calibrate(model, [BATCHES[0], tokens(20)])
    with pytest.raises(OptionError, match="needs data: give the file"):
        fp4graph.backend(quantizer="gptq")
    found = fp4graph.calibrate(model, BATCHES, "q")
    with pytest.raises(CalibrationError, match=r"is for nvfp4, and mxfp4 is asked for"):
        fp4graph.backend("q", format="mxfp4", calibration=found)
    with pytest.raises(OptionError, match="the calibration has nvfp4 by gptq"):
        fp4graph.backend("q", quantizer="scale-search", calibration=found)
    with pytest.raises(CalibrationError, match="cannot read the calibration"):
        fp4graph.backend("q", calibration=tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no such thing")
    with pytest.raises(CalibrationError, match="cannot read the calibration"):
        fp4graph.backend("q", calibration=tmp_path / "bad.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="cannot write"):
        found.save(tmp_path / "file" / "c.safetensors")


def test_goes_on_for_the_same_model_alone(tmp_path: Path) -> None:
    def model(eps: float) -> nn.Module:
        found = tiny("llama")
        for module in found.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = eps  # in no weight and in no configuration
        return found

    def kill(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    out = tmp_path / "c.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fp4graph.calibrate(model(1e-6), BATCHES, out=out, progress=kill)
    found = fp4graph.calibrate(model(0.5), BATCHES, out=out)
    assert found.digest() == fp4graph.calibrate(model(0.5), BATCHES).digest()
    kept = list((tmp_path / "c.safetensors.blocks").iterdir())
    assert len(kept) == 1, "the other's blocks are still there"
    fp4graph.calibrate(model(1e-6), BATCHES, out=out)
    assert [each.name for each in tmp_path.iterdir()] == ["c.safetensors"]


def test_two_at_once_end_with_the_same_codes(tmp_path: Path) -> None:
    """The second ends while the first is between its blocks."""
    out, started = tmp_path / "c.safetensors", []

    def meanwhile(done: int, total: int) -> None:
        if done == 1 and not started:
            started.append(True)
            torch._dynamo.reset()
            fp4graph.calibrate(tiny("llama"), BATCHES, out=out)

    found = fp4graph.calibrate(tiny("llama"), BATCHES, out=out, progress=meanwhile)
    assert started
    assert fp4graph.Calibration.load(out).digest() == found.digest()
    assert found.digest() == fp4graph.calibrate(tiny("llama"), BATCHES).digest()
    assert [each.name for each in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize(
    "quantizer", ["gptq", "weighted-scale-search", "rtn+smooth", "learned", "mr-gptq"]
)
def test_inputs_that_are_no_numbers_are_an_error_for_every_quantizer(quantizer: str) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[int(BATCHES[1][0, 3])] = torch.inf
    with pytest.raises(CalibrationError, match=r"layers\.0.*NaN or Inf"):
        fp4graph.calibrate(model, BATCHES, quantizer=quantizer)


def test_no_damping_ends(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    found = fp4graph.calibrate(model, [tokens(4)], "down", damping=0.0)
    assert len(found.packed) == 2
    assert "damping raised to 0.01" in caplog.text


class LazyTables(nn.Module):
    """Makes its tables in its first call, as several models do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.known = model, 0

    def forward(self, input_ids: Tensor, **options: object) -> object:
        if input_ids.shape[1] > self.known:
            self.known = input_ids.shape[1]
            self.table = torch.arange(self.known) * 0
        return self.model(input_ids + self.table[: input_ids.shape[1]], **options)


def test_a_model_whose_first_call_is_not_like_the_second() -> None:
    plain = fp4graph.calibrate(tiny("llama"), BATCHES)
    lazy = fp4graph.calibrate(LazyTables(tiny("llama")), BATCHES)
    for name, packed in plain.packed.items():
        assert torch.equal(lazy.packed[f"model.{name}"].qdata, packed.qdata)


class Changing(LazyTables):
    """Is another model in each call."""

    def forward(self, input_ids: Tensor, **options: object) -> object:
        self.known += 1
        return self.model(input_ids % self.known, **options)


def test_a_model_that_changes_from_call_to_call_is_an_error() -> None:
    with pytest.raises(fp4graph.StudyError, match="changes from call to call"):
        fp4graph.calibrate(Changing(tiny("llama")), BATCHES)
