"""Auto-PGD on a ball, in coordinates where the metric is the identity.

After Croce & Hein's Auto-PGD as used by Hide & Seek (arXiv 2505.05409, Algorithm 1), corrected: the returned
perturbation attains the returned loss, steps are normalised in the metric (also the first), momentum
extrapolates from the last two iterates, a restart resets the iterate together with its gradient, and the side
opposite to the best point is tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from symgeo.kernels import combination, inner_products

Objective = Callable[[Tensor], tuple[float, Tensor]]  # coordinates -> value and horizontal gradient
Draw = Callable[[], Tensor]
Inner = Callable[[Sequence[Tensor]], Tensor]  # k vectors -> (k, k) inner products in double precision

MOMENTUM = 0.75
PROGRESS = 0.75  # fraction of improving steps below which the step is halved


@dataclass(frozen=True)
class Ascent:
    """Best point of an ascent: its coordinates, value, all values in order, and how many were not finite."""

    point: Tensor
    value: float
    history: list[float]
    rejected: int


def checkpoints(steps: int) -> set[int]:
    """Iterations at which progress is judged: ``ceil(p_j steps)`` with ``p = 0, 0.22``,
    ``p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)``.

    >>> sorted(checkpoints(20))
    [5, 9, 12, 14, 16, 18, 19, 20]
    """
    hundredths, marks = [0, 22], set()
    while hundredths[-1] <= 100:
        marks.add(-(-hundredths[-1] * steps // 100))
        hundredths.append(hundredths[-1] + max(hundredths[-1] - hundredths[-2] - 3, 6))
    return marks


def auto_pgd(
    objective: Objective, start: Tensor, rho: float, steps: int, draw: Draw, inner: Inner = inner_products
) -> Ascent:
    """Maximises ``objective`` over horizontal coordinates ``|z| <= rho``, from ``start`` (the origin).

    ``steps`` evaluations follow the one at ``start``.  Two thirds of them climb from there.  Then the opposite of the
    best point is tried, and the rest climb from the higher of the two: near a minimum of the loss, where it is
    almost even, there is a maximum on either side and the first gradient does not tell which is higher.

    ``inner`` gives the inner products ``(k, k)`` of k vectors in double precision: the lengths of a whole step follow
    from those of three, in one pass over them, and where coordinates are spread over processes in one message.

    Where the gradient vanishes to rounding the search continues from ``draw()`` on the sphere.  A value that is
    not finite counts as outside the domain: the search goes back to the best point and halves its step.
    """
    value, gradient = objective(start)
    origin = Found(start, value, gradient)
    climb = _Climber(objective, rho, draw, inner)
    if steps < 3:  # too few to look at the other side
        only = climb(origin, steps)
        return Ascent(only.top.point, only.top.value, [value, *only.history], only.rejected)
    first = climb(origin, 2 * steps // 3)
    history = [value, *first.history]
    opposite = Found(-first.top.point, *objective(-first.top.point))
    history.append(opposite.value)
    rejected = first.rejected + (not math.isfinite(opposite.value))
    base = opposite if opposite.value > first.top.value else first.top
    second = climb(base, steps - 2 * steps // 3 - 1)
    return Ascent(second.top.point, second.top.value, history + second.history, rejected + second.rejected)


class Found(NamedTuple):
    """A point with the value and the gradient there."""

    point: Tensor
    value: float
    gradient: Tensor


class Climb(NamedTuple):
    """The highest point of a climb, the values in order, and how many were not finite."""

    top: Found
    history: list[float]
    rejected: int


class _Climber:
    """Auto-PGD: momentum, and steps halved with a restart from the best point where progress stalls."""

    def __init__(self, objective: Objective, rho: float, draw: Draw, inner: Inner) -> None:
        self._objective, self._rho, self._draw, self._inner = objective, rho, draw, inner

    def __call__(self, start: Found, steps: int) -> Climb:
        history, rejected = list[float](), 0
        top = home = here = start  # home: where restarts begin, the best point whose gradient does not vanish
        previous, step = start.point, 2 * self._rho
        marks, last_mark, improved, state = checkpoints(steps), 0, 0, (step, start.value)
        for k in range(1, steps + 1):
            if self._vanishes(here):
                candidate = self._on_sphere(self._draw())
            else:
                candidate = self._advance(here, previous, step, first=k == 1)
            found = Found(candidate, *self._objective(candidate))
            history.append(found.value)
            if not math.isfinite(found.value):
                rejected, step = rejected + 1, step / 2
                here, previous = home, home.point
                continue
            improved += found.value > here.value
            previous, here = here.point, found
            top = max(top, found, key=lambda f: f.value)
            if found.value > home.value or self._vanishes(home):
                home = found
            if k in marks:
                stalled = improved < PROGRESS * (k - last_mark) or state == (step, top.value)
                state, last_mark, improved = (step, top.value), k, 0
                if stalled:
                    step, here, previous = step / 2, home, home.point
        return Climb(top, history, rejected)

    def _advance(self, here: Found, previous: Tensor, step: float, first: bool) -> Tensor:
        """``x + a (z - x) + (1 - a)(x - previous)``, ``z`` the normalised gradient step; both back into the ball."""
        vectors = [here.point, here.gradient, previous]
        products = self._inner(vectors)
        x, gradient, before = torch.eye(3, dtype=products.dtype, device=products.device)
        z = into_ball(x + step / _length(gradient, products) * gradient, products, self._rho)
        if not first:
            z = into_ball(MOMENTUM * z + 2 * (1 - MOMENTUM) * x - (1 - MOMENTUM) * before, products, self._rho)
        return combination(vectors, z)

    def _on_sphere(self, z: Tensor) -> Tensor:
        return z * (self._rho / self._inner([z]).sqrt().clamp_min(torch.finfo(z.dtype).tiny)).to(z.dtype).reshape(())

    def _vanishes(self, found: Found) -> bool:
        """Whether the first-order gain ``rho |gradient|`` drowns in the rounding of the loss."""
        gain = self._rho * float(self._inner([found.gradient]).sqrt())
        return gain <= torch.finfo(found.gradient.dtype).eps * abs(found.value) or gain == 0.0


def into_ball(z: Tensor, products: Tensor, rho: float) -> Tensor:
    """Radial projection onto ``|z| <= rho`` of a combination of vectors, coefficients in and out.

    >>> into_ball(torch.tensor([1.0, 0.0]), torch.tensor([[4.0, 0.0], [0.0, 1.0]]), 1.0)
    tensor([0.5000, 0.0000])
    """
    return z * (rho / _length(z, products)).clamp(max=1.0)


def _length(z: Tensor, products: Tensor) -> Tensor:
    """The length of a combination of vectors, from their inner products."""
    return (z @ products @ z).clamp_min(torch.finfo(z.dtype).tiny).sqrt()
