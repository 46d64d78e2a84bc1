"""Rank correlation of a sharpness measure with generalization, with its uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import Tensor

Values = Sequence[float] | NDArray[np.floating] | Tensor


@dataclass(frozen=True)
class RankCorrelation:
    """Kendall's tau of ``n`` pairs, a bootstrap interval [``low``, ``high``] and a two-sided p-value."""

    tau: float
    low: float
    high: float
    pvalue: float
    n: int

    def __str__(self) -> str:
        interval = f"[{self.low:+.2f}, {self.high:+.2f}]"
        return f"tau = {self.tau:+.2f} {interval}, p = {self.pvalue:.2g}, n = {self.n}"


def kendall(
    x: Values, y: Values, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> RankCorrelation:
    """Kendall's rank correlation tau-b between x and y.

        tau = sum_{i<j} sign(x_i - x_j) sign(y_i - y_j) / sqrt(n_x n_y),

    with n_x the number of pairs i < j untied in x, n_y in y. Papers that divide by n (n - 1) / 2 print
    tau-a; the two are equal when nothing is tied. The p-value is SciPy's, for the hypothesis of independence.
    The interval is the percentile bootstrap over models: pairs (x_i, y_i) are drawn with replacement, and
    tau-b is taken of every resample, so that a pair drawn twice is left out of numerator and denominator.
    Resamples with a constant side have no tau and are left out. Where the ranking is perfect the interval is
    [1, 1] or [-1, -1].

    Args:
        x, y: one value per model, n >= 3, finite, neither of them constant.
        resamples: number of bootstrap resamples, which ``seed`` decides.
        level: probability that the interval is to cover, in (0, 1).

    Raises:
        ValueError: an argument is not as stated; the message names it.

    >>> round(kendall([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]).tau, 4)  # 5 pairs agree, 1 disagrees
    0.6667
    """
    if not 0 < level < 1:
        raise ValueError(f"level: needed a probability strictly between 0 and 1, found {level}")
    if resamples < 1:
        raise ValueError(f"resamples: needed at least 1, found {resamples}")
    first, second = _checked("x", x), _checked("y", y)
    if len(first) != len(second):
        raise ValueError(f"y: needed {len(first)} values, one for each value of x, found {len(second)}")
    statistic = kendalltau(first, second)
    samples = _bootstrap(first, second, resamples, seed)
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return RankCorrelation(
        float(statistic.statistic), float(low), float(high), float(statistic.pvalue), len(first)
    )


def _checked(name: str, values: Values) -> NDArray[np.float64]:
    array: NDArray[np.float64] = torch.as_tensor(values, dtype=torch.float64).detach().cpu().numpy()
    if array.ndim != 1 or len(array) < 3:
        raise ValueError(f"{name}: needed a list of at least 3 values, found shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"{name}: needed finite values, found {array[bad[0]]} at position {bad[0]}")
    if np.all(array == array[0]):
        raise ValueError(f"{name}: needed at least two different values, found {array[0]} only")
    return array


def _bootstrap(
    x: NDArray[np.float64], y: NDArray[np.float64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """tau-b of resamples, from how often each drew each pair: sums over pairs are quadratic forms in that."""
    n = len(x)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    sign_x, sign_y = np.sign(x[:, None] - x[None, :]), np.sign(y[:, None] - y[None, :])
    agreement, untied_x, untied_y = (
        np.sum((counts @ form) * counts, axis=1) for form in (sign_x * sign_y, sign_x**2, sign_y**2)
    )
    defined = (untied_x > 0) & (untied_y > 0)
    if not defined.any():
        raise ValueError(f"resamples: all {resamples} resamples were constant in x or y; draw more than that")
    ratio: NDArray[np.float64] = agreement[defined] / np.sqrt(untied_x[defined] * untied_y[defined])
    return ratio
