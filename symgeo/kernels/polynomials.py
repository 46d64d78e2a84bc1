"""Odd quintics whose composition maps ``[lower, 1]`` to 1: matrix signs, polar factors and roots by products only."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

Step = tuple[float, float, float]

# every quintic is laid out for an interval that ends slightly higher than the values do, so that rounding at the
# upper end is contracted and not blown up
_MARGIN = 1e-3
# a quintic laid out for a smaller ratio lower/upper gains nothing at the lower end and overshoots in between
_CUSHION = 0.024
_NEWTON_SCHULZ: Step = (15 / 8, -10 / 8, 3 / 8)  # x -> 1 with error 5/2 e^3
_SHARPEN: Step = (0.0, 5 / 2, -3 / 2)  # fixes 0 and 1, both attracting; divides at sqrt(2/3)


@lru_cache(maxsize=256)
def schedule(lower: float, cut: bool = False) -> tuple[Step, ...]:
    """Steps ``(a, b, c)`` of ``x -> a x + b x^3 + c x^5`` that take every ``x`` in ``[lower, 1]`` to 1 in float64.

    Each step is the best quintic for the interval that the steps before it leave (the composition of best
    approximations is best: Polar Express, arXiv 2505.16932); two Newton-Schulz steps finish.  ``x`` is a singular
    value (polar factor), an eigenvalue (sign) or the root of one (``Y <- Y h(ZY)``, ``Z <- h(ZY) Z`` with
    ``h(w) = a + b w + c w^2``: square root and its inverse).

    What lies below ``lower`` ends in between.  With ``cut``, four steps with the attracting fixed points 0 and 1
    come before the last two (derived here): up to a fifth of ``lower`` goes to 0, from two thirds of it on to 1.

    Raises ``ValueError`` unless ``0 < lower <= 1``.

    >>> x = 0.01
    >>> for a, b, c in schedule(0.01): x = a * x + b * x**3 + c * x**5
    >>> round(x, 14), len(schedule(0.01)), len(schedule(1e-5))
    (1.0, 7, 11)
    """
    if not 0.0 < lower <= 1.0:
        raise ValueError(f"lower: needed 0 < lower <= 1, found {lower}")
    steps: list[Step] = []
    upper = 1.0
    while upper - lower > 2e-2:
        upper *= 1 + _MARGIN
        a, b, c = _best_quintic(max(lower, _CUSHION * upper), upper)
        low, high = (a * x + b * x**3 + c * x**5 for x in (lower, upper))
        scale = 2 / (low + high)  # the cushion moved the lower end: centre the image around 1 again
        steps.append((scale * a, scale * b, scale * c))
        lower, upper = scale * low, scale * high
    return (*steps, *((_SHARPEN,) * 4 if cut else ()), _NEWTON_SCHULZ, _NEWTON_SCHULZ)


def _best_quintic(lower: float, upper: float) -> Step:
    """The odd quintic closest to 1 on ``[lower, upper]``, by Remez exchange of its two inner extrema."""
    first, second = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    error = math.inf
    for _ in range(50):
        nodes = np.array([lower, first, second, upper])
        system = np.stack([nodes, nodes**3, nodes**5, [1, -1, 1, -1]], axis=1)
        a, b, c, new_error = (float(value) for value in np.linalg.solve(system, np.ones(4)))
        if abs(new_error - error) <= 1e-15:
            break
        error = new_error
        root = math.sqrt(9 * b * b - 20 * a * c)
        first, second = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c
