"""Numbers and tensors that come with a standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


class Estimate(float):
    """A number with its standard error; it is a ``float`` and behaves as one.

    value : the number;  stderr : its standard error, 0 when it is exact;  samples : draws it is the mean of

    >>> x = Estimate(2.5, 0.1, samples=7)
    >>> x.value, x.stderr, x + 1
    (2.5, 0.1, 3.5)
    """

    def __new__(cls, value: float, stderr: float = 0.0, samples: int = 0) -> Estimate:
        self = super().__new__(cls, value)
        self.stderr, self.samples = float(stderr), samples
        return self

    stderr: float
    samples: int

    @property
    def value(self) -> float:
        """The number itself."""
        return float(self)

    def __repr__(self) -> str:
        return f"Estimate({float(self):.8g}, stderr={self.stderr:.2g}, samples={self.samples})"

    def __str__(self) -> str:
        return f"{float(self):.6g}" + (f" ± {self.stderr:.1g}" if self.stderr else "")

    def __reduce__(self) -> tuple[type[Estimate], tuple[float, float, int]]:
        return type(self), (float(self), self.stderr, self.samples)


@dataclass(frozen=True)
class TensorEstimate:
    """A tensor with the standard error of every entry: ``value``, ``stderr`` (zeros when exact), ``samples``."""

    value: Tensor
    stderr: Tensor
    samples: int


def mean_estimate(draws: Tensor) -> Estimate:
    """The mean of independent draws ``(samples,)``, with its standard error (infinite for a single draw)."""
    count = draws.numel()
    error = float(draws.std()) / math.sqrt(count) if count > 1 else math.inf
    return Estimate(float(draws.mean()), error, count)
