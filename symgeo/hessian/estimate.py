"""Numbers and tensors that come with a standard error, and the rounds in which they reach a tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

E = TypeVar("E")


class Estimate(float):
    """A number with its standard error; it is a ``float`` and behaves as one.

    value : the number;  stderr : its standard error, 0 when it is exact;  samples : draws it is the mean of
    products : products with the operator that it took
    converged : whether the error is within the tolerance asked for; True when exact, None where none was asked for,
        False also where the error is that of the quadrature rather than of the draws
    bounds : where given, the number lies between them but for the draws (three standard errors)

    >>> x = Estimate(2.5, 0.1, samples=7)
    >>> x.value, x.stderr, x + 1, x.converged
    (2.5, 0.1, 3.5, None)
    """

    def __new__(cls, value: float, stderr: float = 0.0, samples: int = 0, products: int = 0,
                converged: bool | None = None, bounds: tuple[float, float] | None = None) -> Estimate:
        self = super().__new__(cls, value)
        self.stderr, self.samples, self.products, self.bounds = float(stderr), samples, products, bounds
        self.converged = True if converged is None and not self.stderr else converged
        return self

    stderr: float
    samples: int
    products: int
    converged: bool | None
    bounds: tuple[float, float] | None

    @property
    def value(self) -> float:
        """The number itself."""
        return float(self)

    def affine(self, factor: float, shift: float) -> Estimate:
        """``factor`` times this plus ``shift``, with its errors."""
        ends = None if self.bounds is None else sorted(factor * end + shift for end in self.bounds)
        return Estimate(factor * float(self) + shift, abs(factor) * self.stderr, self.samples, self.products,
                        self.converged, None if ends is None else (ends[0], ends[1]))

    def __repr__(self) -> str:
        return f"Estimate({float(self):.8g}, stderr={self.stderr:.2g}, samples={self.samples})"

    def __str__(self) -> str:
        return f"{float(self):.6g}" + (f" ± {self.stderr:.1g}" if self.stderr else "")

    def __reduce__(self) -> tuple[type[Estimate], tuple[object, ...]]:
        return type(self), (float(self), self.stderr, self.samples, self.products, self.converged, self.bounds)


@dataclass(frozen=True)
class TensorEstimate:
    """A tensor with the standard error of every entry: ``value``, ``stderr`` (zeros when exact), ``samples``.

    products, converged : as of `Estimate`, the tolerance relative to the norm of the tensor
    """

    value: Tensor
    stderr: Tensor
    samples: int
    products: int = 0
    converged: bool | None = None


def student(count: int) -> float:
    """What the standard error of ``count`` draws is multiplied by, so that twice it is a 95 % interval by Student.

    >>> [round(student(n), 2) for n in (2, 5, 16, 100)]
    [6.98, 1.43, 1.09, 1.01]
    """
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 0.97724986805182079)) / 2 if count > 1 else math.inf


def mean_estimate(draws: Tensor, products: int = 0) -> Estimate:
    """The mean of independent draws ``(samples,)``, with its standard error (infinite for a single draw)."""
    count = draws.numel()
    error = student(count) * float(draws.std()) / math.sqrt(count) if count > 1 else math.inf
    return Estimate(float(draws.mean()), error, count, products)


def check_tol(tol: float | None) -> float | None:
    """A relative tolerance, or None."""
    if tol is not None and not 0 < tol < math.inf:
        raise ValueError(f"tol must be a positive number; got {tol}")
    return tol


def refine(
    measure: Callable[[int], E], first: int, budget: int, tol: float | None, sizes: Callable[[E], tuple[float, float]],
    exact: Callable[[], E] | None = None,
) -> tuple[E, bool | None]:
    """``measure(products)`` with more and more of them, until the error is within ``tol``, or the budget used up.

    sizes : error and magnitude of what was measured;  exact : taken as soon as the budget is seen not to do
    """
    if check_tol(tol) is None:
        return measure(budget), None
    total = min(first, budget)
    while True:
        found = measure(total)
        error, size = sizes(found)
        goal = float(tol or 0) * size
        if error <= goal:
            return found, True
        needed = total * (error / goal) ** 2 if goal else math.inf
        if exact is not None and needed > budget:
            return exact(), True
        if total >= budget:
            return found, False
        total = int(min(budget, max(1.5 * total, min(4 * total, 1.1 * needed)) + 1))

