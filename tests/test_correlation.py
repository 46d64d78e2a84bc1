"""Kendall's tau and its bootstrap interval."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from symgeo.sharpness.correlation import kendall


def brute_tau_b(x: np.ndarray, y: np.ndarray) -> float:
    agreement, untied_x, untied_y = 0.0, 0, 0
    for i, j in combinations(range(len(x)), 2):
        agreement += np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
        untied_x += x[i] != x[j]
        untied_y += y[i] != y[j]
    return float(agreement / np.sqrt(untied_x * untied_y))


def test_tau_by_hand() -> None:
    assert kendall([1, 2, 3, 4], [1, 3, 2, 4]).tau == pytest.approx((5 - 1) / 6)
    assert kendall([1, 2, 3, 4], [4, 3, 2, 1]).tau == pytest.approx(-1)
    # pairs: one tied in x, one in y, four agree: 4 / sqrt(5 * 5)
    assert kendall([1, 1, 2, 3], [1, 2, 3, 3]).tau == pytest.approx(4 / 5)


@pytest.mark.parametrize("ties", [False, True])
def test_matches_scipy_and_the_definition(ties: bool) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((2, 23))
    if ties:
        x, y = np.round(x), np.round(y)
    result, expected = kendall(x, y), kendalltau(x, y)
    assert result.tau == pytest.approx(expected.statistic, abs=1e-14)
    assert result.tau == pytest.approx(brute_tau_b(x, y), abs=1e-14)
    assert result.pvalue == pytest.approx(expected.pvalue, abs=1e-14)
    assert result.n == 23


def test_interval_is_the_percentile_bootstrap_of_tau_b() -> None:
    generator = np.random.default_rng(1)
    x = generator.standard_normal(13)
    y = x + generator.standard_normal(13)
    result = kendall(x, y, resamples=300, seed=5, level=0.8)
    counts = np.random.default_rng(5).multinomial(13, np.full(13, 1 / 13), size=300)
    chosen = [np.repeat(np.arange(13), row) for row in counts]
    low, high = np.quantile([kendalltau(x[i], y[i]).statistic for i in chosen], [0.1, 0.9])
    assert (result.low, result.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


def test_interval_covers_about_as_often_as_it_says() -> None:
    generator, correlation, n = np.random.default_rng(2), 0.6, 24
    truth = 2 / np.pi * np.arcsin(correlation)  # tau of a bivariate normal
    covered = 0
    for trial in range(200):
        x, noise = generator.standard_normal((2, n))
        y = correlation * x + np.sqrt(1 - correlation**2) * noise
        result = kendall(x, y, resamples=400, seed=trial)
        covered += result.low <= truth <= result.high
    assert 0.88 <= covered / 200 <= 0.99


def test_seed_and_level_decide_the_interval() -> None:
    x, y = np.random.default_rng(3).standard_normal((2, 17))
    first, same, other = kendall(x, y, seed=1), kendall(x, y, seed=1), kendall(x, y, seed=2)
    assert first == same
    assert first != other
    narrow = kendall(x, y, seed=1, level=0.5)
    assert first.low < narrow.low < narrow.high < first.high


def test_perfect_ranking_has_no_width() -> None:
    result = kendall([1, 2, 3], [4, 5, 6])
    assert (result.tau, result.low, result.high) == pytest.approx((1, 1, 1))


def test_only_ranks_matter_and_tensors_are_welcome() -> None:
    x, y = torch.randn(2, 11, generator=torch.Generator().manual_seed(0))
    assert kendall(x.exp(), y) == kendall(x.numpy(), y.tolist())
    assert str(kendall(x, y)).startswith("tau = ")


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0], r"x: needed a list of at least 3 values, found shape \(2,\)"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], "y: needed 3 values, one for each value of x, found 4"),
        ([1.0, 2.0, 3.0], [1.0, float("nan"), 3.0], "y: needed finite values, found nan at position 1"),
        ([1.0, 2.0, float("inf")], [1.0, 2.0, 3.0], "x: needed finite values, found inf at position 2"),
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], r"x: needed at least two different values, found 2\.0 only"),
    ],
)
def test_bad_values_are_named(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kendall(x, y)


@pytest.mark.parametrize("arguments", [{"level": 1.0}, {"level": 0.0}, {"resamples": 0}])
def test_bad_options_are_named(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}: needed"):
        kendall([1, 2, 3], [1, 3, 2], **arguments)
