"""Auto-PGD on a ball, in coordinates where the metric is the identity.

After Croce & Hein's Auto-PGD as used by Hide & Seek (arXiv 2505.05409, Algorithm 1), corrected: the returned
perturbation attains the returned loss, steps are normalised in the metric (also the first), momentum
extrapolates from the last two iterates, and a restart resets the iterate together with its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Objective = Callable[[Tensor], tuple[float, Tensor]]  # coordinates -> value and horizontal gradient
Draw = Callable[[], Tensor]

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


def auto_pgd(objective: Objective, start: Tensor, rho: float, steps: int, draw: Draw) -> Ascent:
    """Maximises ``objective`` over horizontal coordinates ``|z| <= rho``, from ``start`` (the origin).

    ``steps`` evaluations follow the one at ``start``.  Where the gradient there vanishes to rounding the search
    continues from ``draw()`` on the sphere.  A value that is not finite counts as outside the domain: the
    search goes back to the best point and halves its step.
    """
    value, gradient = objective(start)
    history, rejected = [value], 0
    top = start, value
    home = start, value, gradient  # where restarts begin: the best point whose gradient does not vanish
    x, previous, step = start, start, 2 * rho
    marks, last_mark, improved, state = checkpoints(steps), 0, 0, (step, value)
    for k in range(1, steps + 1):
        lost = _vanishes(gradient, rho, value)
        candidate = _on_sphere(draw(), rho) if lost else _advance(x, previous, gradient, step, rho, first=k == 1)
        last_value, (value, gradient) = value, objective(candidate)
        history.append(value)
        if not math.isfinite(value):
            rejected, step = rejected + 1, step / 2
            x, previous, (_, value, gradient) = home[0], home[0], home
            continue
        previous, x = x, candidate
        improved += value > last_value
        if value > top[1]:
            top = candidate, value
        if value > home[1] or _vanishes(home[2], rho, home[1]):
            home = candidate, value, gradient
        if k in marks:
            stalled = improved < PROGRESS * (k - last_mark) or state == (step, top[1])
            state, last_mark, improved = (step, top[1]), k, 0
            if stalled:
                step, x, previous, (_, value, gradient) = step / 2, home[0], home[0], home
    return Ascent(*top, history, rejected)


def _advance(x: Tensor, previous: Tensor, gradient: Tensor, step: float, rho: float, first: bool) -> Tensor:
    """``x + a (z - x) + (1 - a)(x - previous)``, ``z`` the normalised gradient step; both back into the ball."""
    length = gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)
    z = into_ball(torch.addcmul(x, gradient, step / length), rho)
    if first:
        return z
    z.mul_(MOMENTUM).add_(x, alpha=2 * (1 - MOMENTUM)).sub_(previous, alpha=1 - MOMENTUM)
    return into_ball(z, rho)


def into_ball(z: Tensor, rho: float) -> Tensor:
    """Radial projection onto ``|z| <= rho``, in place."""
    return z.mul_((rho / z.norm().clamp_min(torch.finfo(z.dtype).tiny)).clamp(max=1.0))


def _on_sphere(z: Tensor, rho: float) -> Tensor:
    return z * (rho / z.norm().clamp_min(torch.finfo(z.dtype).tiny))


def _vanishes(gradient: Tensor, rho: float, value: float) -> bool:
    """Whether the first-order gain ``rho |gradient|`` drowns in the rounding of the loss."""
    gain = rho * float(gradient.norm())
    return gain <= torch.finfo(gradient.dtype).eps * abs(value) or gain == 0.0
