"""Means and their errors, against direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fp4graph.study.statistics import halves, interval, mean_and_error


def test_mean_and_error_is_between_windows() -> None:
    values = np.array([[0.0, 2.0], [1.0, 3.0], [6.0, 6.0]])
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(3.0)
    assert error == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3))
    assert mean_and_error(values[:1]) == (1.0, None)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        windows = generator.normal(size=(20, 1)) + generator.normal(size=(20, 8))
        low, high = interval(windows)
        assert low is not None
        assert high is not None
        covered += low <= 0 <= high
    assert 0.88 < covered / 300 < 0.99
    assert interval(windows[:1]) == (None, None)


def test_correlated_tokens_do_not_make_the_interval_smaller() -> None:
    generator = np.random.default_rng(1)
    means = generator.normal(size=(20, 1))
    assert interval(means) == pytest.approx(interval(np.repeat(means, 100, axis=1)))


def test_halves() -> None:
    values = np.array([[1.0], [3.0], [6.0], [8.0]])
    difference, error = halves(values)
    assert difference == pytest.approx(5.0)
    assert error == pytest.approx(math.sqrt(2))
    assert halves(values[:3]) == (None, None)
