"""Statistics of inputs and weights against direct computation."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny, tokens

from fp4graph.models import LoadedModel
from fp4graph.study.evaluate import Windows
from fp4graph.study.outliers import Accumulator, by_role, outliers


def test_statistics_of_pieces_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 64) * 3 + 0.5
    x[17, 5], x[:, 9] = -70.0, x[:, 9] * 30
    seen = Accumulator(64)
    for piece in x.split(500):
        seen.add(piece.reshape(5, 100, 64))
    found = seen.result()
    wide = x.double()
    assert found.max == float(x.abs().max())
    assert found.p999 == pytest.approx(float(wide.abs().flatten().quantile(0.999)), rel=1 / 128)
    assert found.ratio == pytest.approx(found.max / found.p999)
    central = wide - wide.mean()
    kurtosis = float((central**4).mean() / (central**2).mean() ** 2)
    assert found.kurtosis == pytest.approx(kurtosis, rel=1e-9)
    assert found.rms == pytest.approx(float((wide**2).mean().sqrt()))
    assert found.outlier_channels == 1


def test_nothing_but_zeros() -> None:
    seen = Accumulator(8)
    seen.add(torch.zeros(3, 8))
    found = seen.result()
    assert (found.max, found.ratio, found.kurtosis, found.outlier_channels) == (0, 1, 0, 0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sees_what_hooks_see(family: str) -> None:
    model = tiny(family).requires_grad_(False)
    windows = Windows(tokens(12, batch=3), first=1)
    ticks: list[int] = []
    found = outliers(LoadedModel("tiny", model, None), windows, lambda: ticks.append(1))
    rows = list(found.values())
    assert all(row.path == tag.fqn for tag, row in found.items())
    assert len(ticks) == 3
    for row in rows:
        module = model.get_submodule(row.path)
        seen = Accumulator(row.shape[1])
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.add(args[0]))
        with torch.no_grad():
            model(windows.ids, use_cache=False)
        handle.remove()
        expected = seen.result()
        assert row.tokens == 36
        assert row.input.max == pytest.approx(expected.max, rel=1e-5)
        assert row.input.rms == pytest.approx(expected.rms, rel=1e-5)
        assert row.weight.max == float(module.weight.abs().max())
    roles = by_role(rows)
    downs = [row.input.ratio for row in rows if row.role == "down"]
    assert roles["down"][0].ratio == pytest.approx(sum(downs) / len(downs))
