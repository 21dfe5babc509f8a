"""What results mean, in words that the numbers bear out."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from support.trials import row

from fp4graph import Selector
from fp4graph.linears.tags import LinearTag, Role
from fp4graph.study import verdicts
from fp4graph.study.additivity import SetRow
from fp4graph.study.correlation import Correlation

TAGS = [
    LinearTag(f"blocks.{block}.{role}", role, block, 30, (8, 8))
    for block in range(30)
    for role in (Role.Q, Role.V, Role.DOWN)
]
CELLS = {(str(tag.role), tag.block or 0): 0.001 for tag in TAGS}


def test_the_linears_that_do_the_damage_are_named() -> None:
    cells = CELLS | {("down", 2): 0.02, ("down", 11): 0.015, ("down", 29): 0.01}
    worst, safe = verdicts.of_cells(cells, "damage")
    assert worst == "`down` of blocks 2, 11, 29 make up 34% of the damage (0.13 nats in all)"
    start, _, selector = safe.partition('--select "')
    assert start.startswith("the 13 least damaging of 90 linears cost 0.013 nats together")
    picked = [tag for tag in TAGS if Selector(selector.rstrip('"')).picks(tag)]
    assert len(picked) == 13
    assert not any(cells[str(tag.role), tag.block or 0] > 0.001 for tag in picked)


def test_many_linears_are_counted_and_the_first_named() -> None:
    worst, _ = verdicts.of_cells(CELLS, "damage")
    assert worst.startswith("the 27 most damaging of 90 linears, `q` of blocks 0, 1 and `v`")
    assert "before others, make up 30% of the damage" in worst


def test_nats_become_perplexity() -> None:
    one = row("all", 0.05, dnll=0.05, dnll_se=0.01, top1=0.9)
    (said, following) = verdicts.of_ablation([row("none", 0.0, format=None), one])
    assert "`all` costs 0.050 nats KL a token; perplexity +5.1% +- 1.1%" in said
    assert "10.0% of tokens have another first choice" in said
    assert "--by role" in following


def test_roles_from_most_to_least_and_what_cannot_be_seen() -> None:
    rows = [row("q", 0.02, kl_se=0.001), row("v", 0.07, kl_se=0.001), row("o", 0.001, kl_se=0.001)]
    said = verdicts.of_ablation(rows)
    assert "nvfp4 W4A16: `v` costs most (0.070 nats KL), `o` least (0.0010 nats)" in said
    assert "nvfp4 W4A16: 1 of 3 trials cost nothing that this text can show" in said
    assert verdicts.of_ablation(rows, left=7)[-1].startswith("7 trials are left")


@pytest.mark.parametrize(
    "ratios, words",
    [
        ((0.96, 0.9, 1.0), "0.90 to 1.00 times .* right to 10 %, so damages may be added up"),
        ((0.96, 1.6), "wrong by up to 60%; measure a mix before you rely on it"),
    ],
)
def test_whether_sums_may_be_taken(ratios: tuple[float, ...], words: str) -> None:
    first = SetRow("t", "text", "nvfp4", "none", "rtn", "q", 4, 0.1, 0.1, 0.1, 0.1, 0.01)
    rows = [replace(first, kl=0.1 * ratio) for ratio in ratios]
    (said,) = verdicts.of_sets(rows)
    assert re.search(words, said)
    assert verdicts.of_sets([]) == []


def test_whether_scores_tell() -> None:
    numbers = (0.95, 0.9, 0.97, 0.8, 0.7, 0.9)
    how = ("t", "text", "nvfp4", "none", "rtn", None, 14)
    good = Correlation("kl", "kl", *how, *numbers)
    poor = Correlation("fisher", "kl", *how, 0.5, *numbers[1:])
    (said,) = verdicts.of_correlations([poor, good], "scores")
    assert said.startswith("scores tell well which linears cost most: the best, `kl`")
    (said,) = verdicts.of_correlations([poor], "outliers")
    assert said.startswith("outliers tell hardly")


@pytest.mark.parametrize(
    "value, text",
    [(1.234, "1.23 nats"), (0.05, "0.050 nats"), (0.00123, "0.0012 nats"), (0.0, "0.0000 nats")],
)
def test_nats(value: float, text: str) -> None:
    assert verdicts.nats(value) == text


def test_a_grid_beside_sets_says_whether_damages_add_up() -> None:
    grid = [row(f"{role},blocks={block}", kl, kl_se=1e-6) for (role, block), kl in CELLS.items()]
    sets = [
        row("q", 0.029, kl_se=1e-6, linears=30), row("blocks=3", 0.003, kl_se=1e-6, linears=3),
        row("all", 0.081, kl_se=1e-6, linears=90),
    ]  # fmt: skip
    said = verdicts.of_ablation([*grid, *sets])
    assert any("sets cost 0.90 to 1.00 times" in each and "right to 10 %" in each for each in said)
    said = verdicts.of_ablation([*grid, *(replace(each, kl=each.kl / 3) for each in sets)])
    (sums,) = (each for each in said if "sets cost" in each)
    assert "as in 16-bit dtypes" in sums
    assert "wrong by up to 70%" in sums
    few = verdicts.of_ablation([*grid[:40], sets[0], sets[2]])
    assert not any("sets cost" in each for each in few), "linears of q are lacking"
