"""Plans for a model: from estimates and measurements, for engines, in bits and in time."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from support.models import tiny, tokens
from support.trials import row

import fp4graph
from fp4graph import OptionError, Policy, Report, Scheme, StudyError, TracedModel, study
from fp4graph.budget import times as timing
from fp4graph.budget.damage import damages
from fp4graph.budget.file import write_policy
from fp4graph.budget.find import Request, Search, schemes_for, search
from fp4graph.budget.plan import Budget
from fp4graph.budget.verify import compare
from fp4graph.checkpoints.fused import fused_sets
from fp4graph.cli import main
from fp4graph.linears.tags import LinearTag, Role
from fp4graph.models import LoadedModel
from fp4graph.study.evaluate import Windows
from fp4graph.study.measured import Measured
from fp4graph.study.plan import read_mix
from fp4graph.study.progress import SILENT
from fp4graph.study.sensitivity import SensitivityRow

if TYPE_CHECKING:
    from pathlib import Path

IDS, OTHER = tokens(24, batch=4), tokens(24, batch=5)
SCHEMES = schemes_for(("nvfp4", "mxfp4", "fp8"), ("rtn",), "none")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return LoadedModel("tiny", tiny("llama").requires_grad_(False).eval(), None)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP4GRAPH_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "_POOL_BYTES", 1e5)


def found(model: LoadedModel, budget: Budget, **options: Any) -> Search:
    request = Request(budget, SCHEMES, **options)
    return search(model, Windows(IDS, 1), request, SILENT)


def test_a_policy_is_within_its_bits_and_better_than_uniform(model: LoadedModel) -> None:
    policy = fp4graph.best_policy(model, IDS, bits=6.0, progress=SILENT)
    tags = [tag for tag in found(model, Budget("bits", 6.0)).tags if tag.is_block_linear]
    schemes = [policy.decide(tag).scheme for tag in tags]
    packed = sum(
        scheme.format.packed_bytes(*tag.shape) if scheme else 2 * tag.parameters
        for tag, scheme in zip(tags, schemes, strict=True)
    )
    values = sum(tag.parameters for tag in tags)
    assert 5.0 < 8 * packed / values <= 6.0
    table = study.ablate(model, OTHER, [policy, "all"], progress=SILENT)
    kl = {each.selector: each.kl for each in table}
    assert kl[policy.text] < 0.8 * kl["all"]


def test_what_was_measured_stands_in_place_of_estimates(model: LoadedModel, tmp_path: Path) -> None:
    study.ablate(model, OTHER, by="role,block", format="nvfp4", out=tmp_path, progress=SILENT)
    with_store = found(model, Budget("bits", 6.0), store=tmp_path)
    assert with_store.notes[0] == "nvfp4 W4A16: 14 of 14 linears measured"
    assert with_store.notes[1] == "mxfp4 W4A16: estimated"
    table = study.ablate(model, OTHER, by="role,block", out=tmp_path, progress=SILENT)
    measured = {each.selector: each.kl for each in table}
    for item in with_store.items:
        (tag,) = item.tags
        assert item.choices[1].kl == measured[f"{tag.role},blocks={tag.block}"]


def test_an_engine_s_sets_run_in_one_way(model: LoadedModel) -> None:
    result = found(model, Budget("bits", 6.5), serve="vllm", count=3)
    for plan in result.plans:
        policy = plan.policy(result.tags)
        for each in fused_sets(result.tags):
            assert len({policy.decide(tag).scheme for tag in each.members}) == 1
    loose = found(model, Budget("bits", 6.5)).plans[0]
    assert loose.kl <= result.plans[0].kl
    with pytest.raises(OptionError, match="expected vllm, sglang"):
        found(model, Budget("bits", 5.0), serve="tgi")


def test_times_are_measured_once(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp4graph.timing.BUSY", 1e9)
    first = found(model, Budget("speedup", 1.01), timed=True)
    dense = sum(choice.us or 0.0 for choice in (item.choices[0] for item in first.items))
    assert 0 < first.plans[0].us <= dense / 1.01
    monkeypatch.setattr(timing, "_measure", lambda *_: pytest.fail("it was measured before"))
    again = found(model, Budget("ms", dense / 1000), timed=True)
    assert [item.choices[1].us for item in again.items] == [
        item.choices[1].us for item in first.items
    ]


def test_times_of_a_busy_machine_are_not_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scheme, answers = SCHEMES[0], [({SCHEMES[0]: 9.0}, False), ({SCHEMES[0]: 3.0}, True)]
    monkeypatch.setattr(timing, "_measure", lambda *_: answers.pop(0))
    assert timing.times([(16, 32)], [scheme]) == {((16, 32), scheme): 9.0}
    assert "the machine was busy while (16, 32) was timed" in caplog.text
    for _ in range(2):
        assert timing.times([(16, 32)], [scheme]) == {((16, 32), scheme): 3.0}
    assert not answers


def test_plans_are_measured_beside_what_they_have_to_beat(
    model: LoadedModel, tmp_path: Path
) -> None:
    result = found(model, Budget("bits", 6.0), count=2)
    table = compare(result, model, Windows(OTHER, 1), title="t", out=tmp_path, progress=SILENT)
    names = [row.plan for row in table]
    assert names[:3] == ["plan 1", "plan 2", "uniform nvfp4 W4A16"]
    assert {"greedy", "HIGGS", "Fisher", "output error", "random 8"} <= set(names)
    assert all(row.bits <= 6.0 for row in table)
    least = min(row.measured_kl for row in table)
    assert all(each.regret == each.measured_kl - least for each in table)
    for each in (table[0], table[-1]):
        again = study.ablate(model, OTHER, [Policy.of(each.select, Scheme.of())], progress=SILENT)
        assert again[-1].kl == pytest.approx(each.measured_kl, rel=1e-4)
    assert "of the best uniform one" in table.verdict[0]
    assert "the prediction is" in table.verdict[-1]
    table.draw(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    kl = compare(found(model, Budget("kl", 0.01)), model, Windows(OTHER, 1), progress=SILENT)
    assert all(row.bytes <= kl[0].bytes for row in kl)
    alone = compare(result, model, None, title="t")
    assert len(alone) == 2
    assert alone[0].measured_kl is None


def test_a_file_is_what_mixes_are_read_from(tmp_path: Path) -> None:
    mapping = {"all": "nvfp4", "path:*.q": {"format": "fp8", "activations": "same"}, "v": None}
    policy = Policy.of(mapping, Scheme.of())
    write_policy(policy, tmp_path / "p.toml", 'a "name"', "two\nlines")
    select, name = read_mix(tmp_path / "p.toml")
    assert name == 'a "name"'
    assert Policy.of(select, Scheme.of()) == policy
    assert tomllib.loads((tmp_path / "p.toml").read_text())["select"]["v"] == "dense"
    with pytest.raises(StudyError, match="cannot write"):
        write_policy(policy, tmp_path / "p.toml" / "x.toml", "", "")


def test_schemes_are_what_formats_have() -> None:
    texts = [str(each) for each in schemes_for(("nvfp4", "fp8"), ("rtn", "scale-search"), "none")]
    assert texts == ["nvfp4 W4A16", "nvfp4 W4A16, scale-search", "fp8 W8A16"]
    texts = [str(each) for each in schemes_for(("nvfp4", "fp8"), ("mr-gptq",), "same")]
    assert texts == ["nvfp4 W4A4, mr-gptq", "fp8 W8A8"]
    with pytest.raises(OptionError, match="unknown quantizer 'nearest'"):
        schemes_for(("nvfp4",), ("nearest",), "none")
    with pytest.raises(OptionError, match="is for FP4"):
        schemes_for(("fp8",), ("scale-search",), "none")


TAGS = [LinearTag(f"b.{n}.q", Role.Q, n, 8, (16, 16)) for n in range(8)]


def score(tag: LinearTag, kl: float, quantizer: str = "rtn") -> SensitivityRow:
    how = ("nvfp4", Scheme.of().activations, quantizer)
    return SensitivityRow(tag.fqn, "q", tag.block, *how, 1, 0, 0, 0, 0, 0, 0, 0, kl, kl / 10, 0)


def trials(quantizer: str, singles: int, whole: float | None = None) -> Measured:
    kept = {frozenset({tag.fqn}): row("x", 3.0, kl_se=0.5) for tag in TAGS[:singles]}
    if whole is not None:
        kept[frozenset(tag.fqn for tag in TAGS)] = row("all", whole)
    return Measured("t", "t", "nvfp4", "none", quantizer, kept)


def test_estimates_are_brought_to_the_scale_of_what_was_measured() -> None:
    scores = [score(tag, 2.0) for tag in TAGS]
    known, said = damages(Scheme.of(), TAGS, [trials("rtn", 6)], scores)
    assert [known[tag].kl for tag in TAGS] == [3.0] * 8
    assert [known[tag].measured for tag in TAGS] == [True] * 6 + [False] * 2
    assert known[TAGS[7]].error == pytest.approx(0.3)
    assert known[TAGS[0]].error == 0.5
    assert said == "nvfp4 W4A16: 6 of 8 linears measured, the others estimated, times 1.50"
    few, _ = damages(Scheme.of(), TAGS, [trials("rtn", 2)], scores)
    assert [few[tag].kl for tag in TAGS] == [3.0] * 2 + [2.0] * 6


def test_a_quantizer_that_needs_data_is_told_from_rounding_to_nearest() -> None:
    gptq = Scheme.read("nvfp4", "gptq", None, "auto")
    scores = [score(tag, 2.0) for tag in TAGS]
    known, said = damages(gptq, TAGS, [trials("rtn", 0, 8.0), trials("gptq", 0, 2.0)], scores)
    assert [known[tag].kl for tag in TAGS] == [0.5] * 8
    assert said.endswith("times 0.25: what all of them measured")
    known, said = damages(gptq, TAGS, [], scores)
    assert [known[tag].kl for tag in TAGS] == [2.0] * 8
    assert said.endswith("for nothing was measured")
    with pytest.raises(StudyError, match=r"nothing says what b\.0\.q costs"):
        damages(gptq, TAGS, [], [])


def test_the_command(folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fp4graph.timing.BUSY", 1e9)  # so that times are kept whatever else runs
    folder, out = folder_of("llama"), tmp_path / "p.toml"
    sizes = ("--tokens", "128", "--seq-len", "16", "--verify-tokens", "128", "--verify", "1")
    arguments = ["policy", str(folder), "--bits", "6", *sizes, "--out", str(out), "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    keys = "plan bits bytes ms predicted_kl predicted_se measured_kl kl_se regret select"
    assert list(rows[0]) == keys.split()
    again = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "kept of" in again.stderr or "nothing to run" in again.stderr
    assert again.stdout == result.stdout
    select, _ = read_mix(out)
    assert Policy.of(select, Scheme.of()) == Policy.of(rows[0]["select"], Scheme.of())
    for wrong, message in (
        (["--bits", "6", "--kl", "1"], "give one budget"),
        (["--bytes", "many"], "expected bytes"),
        (["--bits", "2", "--verify", "0"], "the least there is, is 4."),
        (["--bits", "6", "--verify-corpus", "pydoc"], "estimated on that text"),
    ):
        failed = CliRunner().invoke(main, ["policy", str(folder), *sizes[:4], *wrong])
        assert failed.exit_code == 2
        assert message in failed.output


def test_results_say_which_model_they_are_of(tmp_path: Path, folder_of: Any) -> None:
    folder = folder_of("llama")
    sizes = ("--tokens", "64", "--seq-len", "16")
    arguments = ["ablate", str(folder), "--select", "all", *sizes, "--out", str(tmp_path / "o")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    arguments = ["policy", str(tmp_path / "o"), "--bits", "6", "--verify", "0", *sizes]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "plan 1" in result.output


@pytest.mark.parametrize("family", ["phi3", "gpt2", "mixtral"])
def test_fused_weights_and_budgets_that_leave_all_dense(family: str) -> None:
    other = LoadedModel(family, tiny(family).requires_grad_(False).eval(), None)
    for bits in (6.0, 16.0):
        request = Request(
            Budget("bits", bits), schemes_for(("nvfp4", "fp8"), ("rtn",), "none"), "vllm"
        )
        result = search(other, Windows(IDS, 1), request, SILENT)
        best = compare(result, other, Windows(OTHER, 1), progress=SILENT)[0]
        policy = result.plans[0].policy(result.tags)
        for item, choice in zip(result.items, result.plans[0].chosen, strict=True):
            assert all(policy.decide(tag).scheme == choice.scheme for tag in item.tags)
        assert best.bits <= bits
        assert (best.measured_kl == 0.0) == (bits == 16.0)


def test_linears_that_cannot_run_are_named(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(traced: TracedModel, policy: Policy) -> Report:
        report = plan(traced, policy)
        refused = [row for row in report if "up_proj" in row.path]
        report.include(replace(row, selected=False, reason="refused: why") for row in refused)
        return report

    plan = TracedModel.plan
    monkeypatch.setattr(TracedModel, "plan", refuses)
    result = found(model, Budget("bits", 6.0))
    assert len(result.items) == 12
    assert result.notes[0].startswith("2 linears stay dense and are not counted, such as ")
    assert result.notes[0].endswith("up_proj: refused: why")
