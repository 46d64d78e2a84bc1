"""Fréchet means: the point with the smallest weighted sum of squared distances."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from manifolds.base import QuotientManifold
from manifolds.linalg import widen
from manifolds.product import Product

_SMALLEST_STEP = 2.0**-20


@dataclass(frozen=True)
class FrechetMean:
    """Result of :func:`frechet_mean`.

    point : the mean, or the last iterate;  converged : whether every batch element met the tolerance;
    iterations : steps taken;  gradient_norm : ``|sum_i w_i log_x x_i|`` of the worst batch element;
    spread : its ``max_i |log_x x_i|``, to compare with.
    """

    point: Any
    converged: bool
    iterations: int
    gradient_norm: float
    spread: float


def frechet_mean(
    manifold: QuotientManifold,
    points: Sequence[Any] | Tensor,
    weights: Sequence[float] | Tensor | None = None,
    tol: float = 1e-10,
    max_iter: int = 200,
    start: Any = None,
) -> FrechetMean:
    """``argmin_x sum_i w_i dist(x, x_i)^2``, by Karcher's iteration ``x <- exp_x(t sum_i w_i log_x x_i)``.

    points : tensors ``(..., *point)``, dictionaries for a :class:`Product`, or one tensor stacked along its
    first dimension;  weights : one number >= 0 per point, normalised here (default: equal);  start : the
    first iterate (default: the point with the largest weight).

    Leading dimensions are independent problems, each with its own step ``t``, which is halved where the
    gradient ``sum_i w_i log_x x_i`` would grow.  A problem has converged when its norm is at most ``tol``
    times the largest ``|log_x x_i|``, or rounding error.  Computed in double precision without autograd; the
    point has the dtype of the points.  (Fréchet merging, arXiv 2604.27155; a mean of the geometric kind needs
    points that are close enough for their logarithms to exist.)

    Raises ``ValueError`` for weights that are negative, not finite, all zero or of the wrong number, and
    where the manifold has no logarithm between the start and a point.

    >>> from manifolds.elementwise import Elementwise
    >>> round(frechet_mean(Elementwise(), torch.tensor([[2.0], [8.0]])).point.item(), 6)
    4.0
    """
    points = list(points)
    chosen = _weights(weights, len(points))
    if isinstance(points[0], Mapping):
        return _product_mean(manifold, points, chosen, tol, max_iter, start)
    shapes = {tuple(p.shape) for p in points}
    if len(shapes) > 1 or (start is not None and tuple(start.shape) not in shapes):
        raise ValueError(f"points (and start) must have one shape; got {sorted(shapes)}")
    kept = [i for i, w in enumerate(chosen) if w > 0]
    problem = _Karcher(manifold, [points[i] for i in kept], [chosen[i] for i in kept])
    first = points[max(kept, key=chosen.__getitem__)] if start is None else start
    return problem.solve(first, tol, max_iter)


def _weights(weights: Sequence[float] | Tensor | None, count: int) -> list[float]:
    if count == 0:
        raise ValueError("points must not be empty")
    if weights is None:
        return [1.0 / count] * count
    values = [float(w) for w in weights]
    if len(values) != count:
        raise ValueError(f"weights needs one number per point: {count} points, {len(values)} weights")
    if not all(math.isfinite(w) and w >= 0 for w in values) or sum(values) == 0:
        raise ValueError(f"weights of a mean must be finite, >= 0 and not all zero; got {values}")
    total = sum(values)
    return [w / total for w in values]


def _product_mean(
    manifold: QuotientManifold,
    points: Sequence[Mapping[str, Tensor]],
    weights: list[float],
    tol: float,
    max_iter: int,
    start: Mapping[str, Tensor] | None,
) -> FrechetMean:
    """The mean in a product is the mean in each factor: the sum of squared distances separates."""
    if not isinstance(manifold, Product):
        raise ValueError(f"points are dictionaries, which needs a Product; got {manifold.name}")
    for p in points:
        manifold.inner(points[0], p)  # checks the names and shapes
    means = {
        name: frechet_mean(
            factor, [p[name] for p in points], weights, tol, max_iter, None if start is None else start[name]
        )
        for name, factor in manifold.factors.items()
    }
    worst = max(means.values(), key=lambda m: (not m.converged, m.gradient_norm / max(m.spread, 1e-300)))
    return FrechetMean(
        {name: m.point for name, m in means.items()},
        all(m.converged for m in means.values()),
        max(m.iterations for m in means.values()),
        worst.gradient_norm,
        worst.spread,
    )


@dataclass(frozen=True)
class _State:
    """An iterate with its gradient, the norm of that and the largest logarithm, per batch element."""

    point: Tensor
    gradient: Tensor
    norm: Tensor
    spread: Tensor

    def update(self, mask: Tensor, other: _State, column: tuple[None, ...]) -> _State:
        wide = mask[(..., *column)]
        return _State(
            torch.where(wide, other.point, self.point),
            torch.where(wide, other.gradient, self.gradient),
            torch.where(mask, other.norm, self.norm),
            torch.where(mask, other.spread, self.spread),
        )


class _Karcher:
    """Karcher's iteration for the points of a batch of problems."""

    def __init__(self, manifold: QuotientManifold, points: Sequence[Tensor], weights: Sequence[float]):
        self.manifold, self.dtype = manifold, points[0].dtype
        self.column: tuple[None, ...] = (None,) * manifold.ndim
        self.points = widen(torch.stack([p.detach() for p in points]))
        self.weights = torch.tensor(weights, dtype=torch.float64, device=self.points.device)

    @torch.no_grad()
    def solve(self, start: Tensor, tol: float, max_iter: int) -> FrechetMean:
        state = self._state(widen(start.detach()))
        step, iterations = torch.ones_like(state.norm), 0
        while True:
            bound = torch.maximum(tol * state.spread, self._rounding(state.point))
            active = ~(state.norm <= bound) & (step > _SMALLEST_STEP)
            if iterations == max_iter or not bool(active.any()):
                break
            iterations += 1
            move = torch.where(active, step, 0.0)[(..., *self.column)] * state.gradient
            proposal = self._propose(state, move)
            better = active & (proposal.norm <= state.norm)
            state = state.update(better, proposal, self.column)
            step = torch.where(active & ~better, 0.5 * step, step)
        return self._report(state, bound, iterations)

    def _propose(self, state: _State, move: Tensor) -> _State:
        """The state after ``move``; with an infinite gradient where a map of the manifold is not defined."""
        try:
            return self._state(self.manifold.expmap(state.point, move))
        except ValueError:
            return replace(state, norm=torch.full_like(state.norm, torch.inf))

    def _state(self, x: Tensor) -> _State:
        logs = self.manifold.logmap(x.expand_as(self.points), self.points)
        gradient = torch.einsum("i,i...->...", self.weights.to(logs.dtype), logs)
        spread = self.manifold.norm(x.expand_as(self.points), logs).amax(0)
        return _State(x, gradient, self.manifold.norm(x, gradient), spread)

    def _rounding(self, x: Tensor) -> Tensor:
        """The size of a gradient that is only rounding error: eps times ``|x|``, taken as a tangent vector."""
        return 100 * torch.finfo(torch.float64).eps * self.manifold.norm(x, x)

    def _report(self, state: _State, bound: Tensor, iterations: int) -> FrechetMean:
        converged = bool((state.norm <= bound).all())
        if state.norm.numel() == 0:
            return FrechetMean(state.point.to(self.dtype), True, iterations, 0.0, 0.0)
        worst = (state.norm / bound.clamp_min(torch.finfo(torch.float64).tiny)).flatten().argmax()
        norm, spread = float(state.norm.flatten()[worst]), float(state.spread.flatten()[worst])
        return FrechetMean(state.point.to(self.dtype), converged, iterations, norm, spread)
