"""What is read out of a store: sets, sums, pairs, and how scores go with them."""

from __future__ import annotations

import json
import sqlite3
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import stats
from support.trials import row

from fp4graph.linears.tags import LinearTag, Role
from fp4graph.study.ablate import PROTOCOL
from fp4graph.study.additivity import pairs, sets
from fp4graph.study.correlation import correlate
from fp4graph.study.measured import Measured, measured
from fp4graph.study.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from fp4graph.study.trial import Row

ROLES = (Role.Q, Role.V, Role.DOWN)
TAGS = [
    LinearTag(f"blocks.{block}.{role}", role, block, 4, (8, 8))
    for block in range(4)
    for role in ROLES
]
ALL = frozenset(tag.fqn for tag in TAGS)


def kept(folder: Path, *rows: Row, **identity: object) -> Store:
    store = Store(folder / "trials.sqlite")
    for each in rows:
        trial = {name: getattr(each, name) for name in ("selector", "format", "direction")}
        found = {"protocol": PROTOCOL, "model": "m", "text": "t", **trial, **identity}
        store.put(found, each)
    return store


def cell(tag: LinearTag, kl: float) -> Row:
    return row(f"{tag.role},blocks={tag.block}", kl)


def test_trials_by_what_they_have_in_fp4(tmp_path: Path) -> None:
    dense = row("none", 0.0, format=None)
    found = measured(
        kept(tmp_path, dense, row("q", 1.0), row("q", 2.0, "except"), row("all", 3.0)), "m", TAGS
    )
    assert len(found) == 1
    q = frozenset(tag.fqn for tag in TAGS if tag.role == Role.Q)
    assert {paths: each.kl for paths, each in found[0].trials.items()} == {
        q: 1.0, ALL - q: 2.0, ALL: 3.0
    }  # fmt: skip
    setting = found[0]
    how = (setting.text, setting.corpus, setting.format, setting.activations, setting.quantizer)
    assert how == ("t", "text t", "nvfp4", "none", "rtn")


def test_nothing_is_mixed(tmp_path: Path) -> None:
    store = kept(tmp_path, row("q", 1.0))
    kept(tmp_path, row("q", 2.0), text="other")
    kept(tmp_path, row("q", 3.0), torch="another")
    kept(tmp_path, row("q", 4.0), model="another")
    older = json.dumps({"protocol": PROTOCOL - 1, "model": "m", "text": "t"})
    with sqlite3.connect(tmp_path / "trials.sqlite") as db:
        db.execute("INSERT INTO trials VALUES ('k', ?, ?)", (older, '{"dnll": 5.0}'))
    found = [next(iter(each.trials.values())).kl for each in measured(store, "m", TAGS)]
    assert found == [1.0, 2.0, 3.0]


def test_sets_beside_the_sum_of_their_linears(tmp_path: Path) -> None:
    cells = [cell(tag, 0.25) for tag in TAGS if tag.role != Role.V]
    trials = [*cells, row("q", 1.5), row("blocks=0", 9.0), row("q,down,blocks=0", 0.7)]
    (found,) = measured(kept(tmp_path, *trials), "m", TAGS)
    whole = sets(found)
    assert [each.name for each in whole] == ["q", "q,down,blocks=0"], "v has no trial of its own"
    assert (whole[0].linears, whole[0].kl, whole[0].kl_sum) == (4, 1.5, 1.0)
    assert (whole[0].dnll, whole[0].dnll_sum) == (3.0, 2.0)


def test_pairs_are_found_whatever_they_are_called(tmp_path: Path) -> None:
    trials = [
        row("q", 1.0), row("v,down", 2.0), row("v", 0.5), row("down", 1.0), row("all", 4.0),
        row("q", 2.25, "except"),
    ]  # fmt: skip
    (found,) = measured(kept(tmp_path, *trials), "m", TAGS)
    named = {(each.first, each.second): each.kl_interaction for each in pairs(found)}
    assert named == {("q", "v,down"): 1.0, ("down", "v"): 0.5}
    assert next(iter(named)) == ("q", "v,down"), "the largest first"


def test_correlations_with_their_intervals(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    kl = generator.lognormal(size=len(TAGS))
    (found,) = measured(kept(tmp_path, *map(cell, TAGS, kl)), "m", TAGS)
    noisy = kl * generator.lognormal(sigma=0.5, size=len(TAGS))
    paths = [tag.fqn for tag in TAGS]
    predictors = {
        "noisy": dict(zip(paths, noisy, strict=True)),
        "constant": dict.fromkeys(paths, 1),
    }
    roles = {tag.fqn: str(tag.role) for tag in TAGS}
    rows = correlate(predictors, found, roles)
    assert [(each.predictor, each.target) for each in rows] == [
        ("noisy", "kl"), ("noisy", "dnll"), ("constant", "kl"), ("constant", "dnll"),
    ]  # fmt: skip
    first = rows[0]
    assert first.linears == 12
    assert first.spearman == pytest.approx(stats.spearmanr(noisy, kl).statistic)
    assert first.pearson == pytest.approx(stats.pearsonr(noisy, kl).statistic)
    assert first.spearman_low < first.spearman < first.spearman_high <= 1
    assert rows[2].spearman == 0, "what does not vary tells nothing"
    without = correlate(predictors, found, roles, "down")[0]
    assert (without.linears, without.without) == (8, "down")
    assert correlate({"few": {paths[0]: 1.0}}, found, roles) == []


def test_an_empty_setting_has_no_sets() -> None:
    nothing = Measured("t", "text t", "nvfp4", "none", "rtn", {})
    assert sets(nothing) == pairs(nothing) == []
