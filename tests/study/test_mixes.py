"""Mixes: mappings as texts and files, measured, timed, calibrated, named."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support.calibration import BATCHES
from support.models import tiny, tokens

import fp4graph
from fp4graph import CalibrationError, OptionError, Policy, Scheme
from fp4graph.policy import as_mapping
from fp4graph.study.plan import Group, read_mix, read_plan
from fp4graph.study.trial import DENSE, Trial

if TYPE_CHECKING:
    from pathlib import Path

MIX = {"all": "nvfp4", "v": None, "down,blocks<1": "mxfp4"}
VALUES = st.sampled_from(
    [
        "nvfp4", "mxfp4:rceil", None, {"format": "mxfp4", "activations": "same"},
        {"format": "nvfp4", "quantizer": "scale-search"},
        {"format": "nvfp4", "kernel": "reference"},
    ]
)  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(["all", "q", "blocks<3", "attn | down"]), VALUES, min_size=1)
)
def test_a_mix_and_its_text_are_the_same(mapping: dict[str, Any]) -> None:
    policy = Policy.of(mapping, Scheme())
    text = json.dumps(mapping)
    assert Policy.of(text, Scheme()) == policy
    if len(mapping) > 1:
        assert Policy.of(policy.text, Scheme()) == policy


def test_dense_is_none() -> None:
    assert Policy.of({"all": "nvfp4", "v": "dense"}, Scheme()) == Policy.of(
        {"all": "nvfp4", "v": None}, Scheme()
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"all": "nvfp4"', "column 16: .* a mapping is JSON, such as"),
        ('{"q": "nvfp4", "q": null}', "'q' stands in it twice"),
        ("{}", "expected a selector"),
        ('{"q": "nvfp5"}', "formats are"),
        ('{"q": {"formt": "nvfp4"}}', "unknown option 'formt'"),
    ],
)
def test_texts_that_are_none(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Policy.of(text, Scheme())


def test_lists_are_told_what_to_be() -> None:
    with pytest.raises(OptionError, match=r'expected one selector: "q,k"'):
        fp4graph.backend(["q", "k"])  # type: ignore[arg-type]
    assert as_mapping("q,k") is None


def test_a_mix_is_measured_as_the_backend_runs_it(tmp_path: Path) -> None:
    model = tiny("llama").requires_grad_(False)
    ids = tokens(16, batch=4)
    table = fp4graph.study.ablate(model, ids, MIX, name="best", out=tmp_path)
    dense, row = table
    backend = fp4graph.backend(MIX, inner="eager")
    with torch.no_grad():
        both = [call(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1) for call in
                (model, torch.compile(model, backend=backend))]  # fmt: skip
    kl = float((both[0].exp() * (both[0] - both[1])).sum(-1).mean())
    assert row.kl == pytest.approx(kl, rel=1e-4)
    assert row.linears == len(backend.report.selected) == 12
    assert (row.format, row.name, row.label) == ("nvfp4,mxfp4", "best", "best")
    assert Policy.of(row.selector, Scheme()) == Policy.of(MIX, Scheme())
    assert dense.is_dense
    again = fp4graph.study.ablate(model, ids, json.dumps(MIX), out=tmp_path)
    assert again.rows == table.rows, "found again, with its name"
    renamed = fp4graph.study.ablate(model, ids, MIX, name="second best", out=tmp_path)
    assert renamed[1].name == "second best"


def test_what_a_mix_leaves_open_is_tried_in_every_way() -> None:
    plan = Group((MIX, "q"), activations=("none", "same", "int8")).read().trials()
    assert plan[0] == DENSE
    mixes = [trial for trial in plan if len(trial.select.entries) > 1]
    assert [trial.facts["activations"] for trial in mixes] == ["none", "same", "int8"]
    assert len(plan) == 1 + 3 + 3
    (one,) = Group(('{"attn": "mxfp4"}',)).read().trials()[1:]
    assert one == Trial.of("attn", "mxfp4"), "a mapping of one entry is that selection"


def test_a_file_of_a_mix(tmp_path: Path) -> None:
    file = tmp_path / "best.toml"
    file.write_text(
        'name = "best"\n[select]\nall = "nvfp4"\nv = "dense"\n"down,blocks<1" = "mxfp4"\n'
    )
    select, name = read_mix(file)
    assert name == "best"
    assert Policy.of(select, Scheme()) == Policy.of(MIX, Scheme())
    for text in ("", "select = 3", '[select]\nall = "nvfp4"\n[other]', "name = 3\n[select]", "a ="):
        file.write_text(text)
        with pytest.raises(OptionError, match="mix"):
            read_mix(file)


def test_a_plan_has_mixes_and_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[[trials]]\nselect = [{all = "nvfp4", v = "dense"}, "q"]\nname = ["mix", "only q"]\n'
        '[[trials]]\nselect = {all = "mxfp4"}\nname = "all of it"\n'
    )
    found = [trial for group in read_plan(str(file), {}) for trial in group.read().trials()[1:]]
    assert {trial.name for trial in found} == {"mix", "only q", "all of it"}
    with pytest.raises(OptionError, match="3 names for 1 selectors"):
        Group(("q",), name=("a", "b", "c")).read()


@pytest.mark.slow
def test_one_calibration_of_several_formats_and_quantizers(tmp_path: Path) -> None:
    model = tiny("llama").requires_grad_(False)
    select = {
        "all": "nvfp4",
        "down": {"format": "mxfp4", "quantizer": "learned"},
        "o": {"format": "mxfp4", "quantizer": "scale-search"},
        "v": None,
    }
    out = tmp_path / "c.safetensors"
    fp4graph.calibrate(model, BATCHES, select, out=out)
    found = fp4graph.Calibration.load(out)
    ways = {(str(format), str(how)) for format, how in found.ways}
    assert ways == {("nvfp4", "gptq"), ("mxfp4", "learned"), ("mxfp4", "scale-search")}
    assert not any("v_proj" in name for name in found.packed)
    for name, codes in found.packed.items():
        alone = fp4graph.calibrate(
            model, BATCHES, f"path:{name}", format=codes.format,
            quantizer="gptq", propagate=False,
        ) if "q_proj" in name and ".0." in name else None  # fmt: skip
        assert alone is None or torch.equal(alone.packed[name].qdata, codes.qdata)

    by_gptq = select | {"all": {"quantizer": "gptq"}}
    backend = fp4graph.backend(by_gptq, calibration=out, inner="eager")
    compiled = torch.compile(model, backend=backend)
    rounded = tiny("llama").requires_grad_(False)
    for name in found.packed:
        rounded.get_submodule(name).weight.data.copy_(found.dequantize(name))
    with torch.no_grad():
        assert torch.allclose(
            compiled(tokens(16)).logits, rounded(tokens(16)).logits, atol=1e-4, rtol=1e-3
        )
    open_in_down = by_gptq | {"down": {"format": "mxfp4", "quantizer": "rtn"}}
    with pytest.raises(CalibrationError, match=r"the calibration has mxfp4 by .* say quantizer="):
        fp4graph.backend(open_in_down, calibration=found)
    table = fp4graph.study.ablate(model, tokens(16, batch=4), by_gptq, calibration=out)
    assert table[1].quantizer == "gptq,learned,scale-search"
    assert table[1].linears == 12
    other = fp4graph.calibrate(model, BATCHES, "q", quantizer="gptq:scale-search")
    mix = {"q": "nvfp4", "down": {"format": "mxfp4", "quantizer": "learned"}}
    with pytest.raises(CalibrationError, match="several calibrations have nvfp4: say quantizer="):
        Group((mix,)).read([found, other])
