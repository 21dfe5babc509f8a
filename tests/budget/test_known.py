"""What a folder of results says of a selection, and what export makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from support.models import tiny, tokens

from fp4graph import Policy, Scheme, TracedModel
from fp4graph.budget.known import Known
from fp4graph.cli import main
from fp4graph.study.results import open_results

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

MIX = '{"all": "nvfp4", "v": "fp8"}'


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.fixture(scope="module")
def store(folder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, folder = tmp_path_factory.mktemp("store"), str(folder_of("llama"))
    sizes = ("--tokens", "64", "--seq-len", "16", "--out", str(out))
    assert run("ablate", folder, "--by", "role,block", *sizes).exit_code == 0
    assert run("ablate", folder, "--select", MIX, "--select", "q,k,v", *sizes).exit_code == 0
    return out


def test_a_trial_of_just_that_comes_before_a_sum(store: Path, folder_of: Any) -> None:
    folder = folder_of("llama")
    traced = TracedModel(tiny("llama", vocab=300).requires_grad_(False))
    traced(input_ids=tokens(8), use_cache=False)
    known = Known(store, str(folder), traced.tags)
    results = open_results(store)
    rows = {each.row.selector: each.row for each in results.all()}
    results.close()
    cost = known.of(Policy.of(MIX, Scheme.of()))
    assert cost is not None
    assert cost.kl == rows[MIX].kl
    assert cost.how == "measured on pydoc"
    parts = [rows[f"{role},blocks={block}"].kl for role in "qk" for block in (0, 1)]
    cost = known.of(Policy.of("q,k", Scheme.of()))
    assert cost is not None
    assert cost.kl == pytest.approx(sum(parts))
    assert cost.how == "the sum of 4 linears, each measured alone"
    assert known.of(Policy.of("q,k", Scheme.of("mxfp4"))) is None
    assert Known(store, "another", traced.tags).of(Policy.of(MIX, Scheme.of())) is None


def test_export_says_what_rounding_costs_and_the_card_has_the_damage(
    store: Path, folder_of: Any, tmp_path: Path
) -> None:
    export = ("export", str(folder_of("llama")), "--store", str(store))
    result = run(*export, "--select", "q,k", "--round", "up", "--out", str(tmp_path / "up"))
    assert result.exit_code == 0, result.output
    assert "rounding costs +0." in result.output
    assert "the sum of 2 linears, each measured alone" in result.output
    card = (tmp_path / "up" / "README.md").read_text()
    assert "Damage: 0." in card
    assert "measured on pydoc" in card
    result = run(*export, "--select", "q,k,o", "--round", "down", "--out", str(tmp_path / "down"))
    assert "rounding costs -0." in result.output
    assert "the sum of 4 linears" in result.output
    result = run(*export, "--format", "mxfp4", "--out", str(tmp_path / "mx"))
    assert f"damage: {store} does not tell" in result.output
    assert "Damage" not in (tmp_path / "mx" / "README.md").read_text()
    missing = CliRunner().invoke(main, [*export[:3], str(tmp_path / "none"), "--out", "x"])
    assert missing.exit_code == 2
    assert "there are no results" in missing.output
