"""Fréchet means: the point with the smallest weighted sum of squared distances."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifolds.base import QuotientManifold
from manifolds.linalg import widen
from manifolds.product import Product

_SMALLEST_STEP = 2.0**-20


class ProblemReport(NamedTuple):
    """What became of each problem of a batch, tensors ``(...)``; see :func:`frechet_mean`.

    converged : bool;  gradient_norm : ``|sum_i w_i log_x x_i|``;  spread : ``max_i |log_x x_i|``;  objective :
    ``sum_i w_i dist(x, x_i)^2``;  iterations : steps that were accepted.  Where a point has no logarithm at the
    start, the three numbers are infinite and the start is returned.
    """

    converged: Tensor
    gradient_norm: Tensor
    spread: Tensor
    objective: Tensor
    iterations: Tensor


@dataclass(frozen=True)
class FrechetMean:
    """Result of :func:`frechet_mean`.

    point : the mean, or the last iterate;  converged : whether every batch element met the tolerance;
    iterations : steps taken;  gradient_norm : ``|sum_i w_i log_x x_i|`` of the worst batch element;
    spread : its ``max_i |log_x x_i|``, to compare with;  per_problem : the same for every batch element, a
    :class:`ProblemReport` (for points that are dictionaries, one per name).
    """

    point: Any
    converged: bool
    iterations: int
    gradient_norm: float
    spread: float
    per_problem: Any


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
    times the largest ``|log_x x_i|``, or rounding error; it costs nothing from then on.  Computed in double
    precision without autograd; the point has the dtype of the points.  (Fréchet merging, arXiv 2604.27155; a
    mean of the geometric kind needs points that are close enough for their logarithms to exist.)

    Raises ``ValueError`` for weights that are negative, not finite, all zero or of the wrong number, and
    where the manifold has no logarithm between the start and a point of the only problem.  In a batch such a
    problem is reported in ``per_problem`` and does not touch the others.

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
    problem = _Karcher(manifold, [points[i] for i in kept], [chosen[i] for i in kept], tol)
    first = points[max(kept, key=chosen.__getitem__)] if start is None else start
    return problem.solve(first, max_iter)


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
        {name: m.per_problem for name, m in means.items()},
    )


class _State(NamedTuple):
    """Iterates of some problems ``(p, *point)`` with their gradients, and numbers ``(p,)``.

    norm : of the gradient;  bound : at which it counts as zero;  spread, objective : as in the report.
    """

    point: Tensor
    gradient: Tensor
    norm: Tensor
    bound: Tensor
    spread: Tensor
    objective: Tensor

    def converged(self) -> Tensor:
        """Where the gradient is zero."""
        return torch.isfinite(self.norm) & (self.norm <= self.bound)


class _Karcher:
    """Karcher's iteration for the points of a batch of problems, flattened to ``(points, problems, *point)``."""

    def __init__(self, manifold: QuotientManifold, points: Sequence[Tensor], weights: Sequence[float], tol: float):
        self.manifold, self.tol, self.dtype = manifold, tol, points[0].dtype
        stacked = widen(torch.stack([p.detach() for p in points]))
        lead = stacked.ndim - manifold.ndim
        self.batch, self.single = stacked.shape[1:lead], stacked.shape[lead:]
        self.points = stacked.reshape(len(points), math.prod(self.batch), *self.single)
        self.weights = torch.tensor(weights, dtype=torch.float64, device=stacked.device)

    @torch.no_grad()
    def solve(self, start: Tensor, max_iter: int) -> FrechetMean:
        count, iterations = self.points.shape[1], 0
        state = self._first(widen(start.detach()).reshape(count, *self.single))
        step = torch.ones_like(state.norm)
        accepted = torch.zeros_like(state.norm, dtype=torch.int64)
        while iterations < max_iter:
            active = torch.isfinite(state.norm) & ~state.converged() & (step > _SMALLEST_STEP)
            index = active.nonzero().squeeze(-1)
            if index.numel() == 0:
                break
            iterations += 1
            proposal = self._step(state, step, index)
            better = proposal.norm <= state.norm[index]
            for values, proposed in zip(state, proposal):
                values[index[better]] = proposed[better]
            accepted[index[better]] += 1
            step[index[~better]] *= 0.5
        return self._report(state, iterations, accepted)

    def _step(self, state: _State, step: Tensor, index: Tensor) -> _State:
        """The states after a step of the problems ``index``."""
        move = step[(..., *(None,) * len(self.single))] * state.gradient
        return self._isolated(index, lambda i: self._state(self.manifold.expmap(state.point[i], move[i]), i))

    def _first(self, start: Tensor) -> _State:
        """The state at the start, where one problem alone must have its logarithms."""
        everything = torch.arange(start.shape[0], device=start.device)
        try:
            state = self._state(start, everything)
        except ValueError:
            if not self.batch:
                raise
            state = self._isolated(everything, lambda i: self._state(start[i], i))._replace(point=start.clone())
            if not bool(torch.isfinite(state.norm).any()):
                raise  # not a matter of distance: most likely the arguments are wrong
        if not self.batch and not bool(torch.isfinite(state.norm)):
            self.manifold.logmap(start.expand_as(self.points), self.points)  # raises, with the manifold's own words
        return state

    def _isolated(self, index: Tensor, evaluate: Callable[[Tensor], _State]) -> _State:
        """``evaluate(index)``; where that raises, halves it until only the problems at fault are left out.

        Those get an infinite gradient.
        """
        try:
            return evaluate(index)
        except ValueError:
            if index.numel() > 1:
                halves = [self._isolated(half, evaluate) for half in index.chunk(2)]
                return _State(*(torch.cat(parts) for parts in zip(*halves)))
            nowhere = torch.zeros_like(self.points[0, index])
            return _State(nowhere, nowhere, *[torch.full_like(self.weights[:1], torch.inf)] * 4)

    def _state(self, x: Tensor, index: Tensor) -> _State:
        points = self.points[:, index]
        if index.numel() == 0:
            none = torch.zeros(0, dtype=torch.float64, device=x.device)
            return _State(x, torch.zeros_like(x), none, none, none, none)
        logs, found = self.manifold.try_logmap(x.expand_as(points), points)
        gradient = torch.einsum("i,i...->...", self.weights.to(logs.dtype), logs)
        lengths = self.manifold.norm(x.expand_as(points), logs)
        # a gradient is only rounding error up to eps times |x|, taken as a tangent vector
        rounding = 100 * torch.finfo(torch.float64).eps * self.manifold.norm(x, x)
        numbers = [
            self.manifold.norm(x, gradient),
            torch.maximum(self.tol * lengths.amax(0), rounding),
            lengths.amax(0),
            self.weights @ lengths.square(),
        ]
        return _State(x.clone(), gradient, *(torch.where(found.all(0), value, torch.inf) for value in numbers))

    def _report(self, state: _State, iterations: int, accepted: Tensor) -> FrechetMean:
        converged = state.converged()
        numbers = (converged, state.norm, state.spread, state.objective, accepted)
        each = ProblemReport(*(values.reshape(self.batch) for values in numbers))
        point = state.point.reshape(*self.batch, *self.single).to(self.dtype)
        if converged.numel() == 0:
            return FrechetMean(point, True, iterations, 0.0, 0.0, each)
        ratio = state.norm / state.bound.clamp_min(torch.finfo(torch.float64).tiny)
        worst = torch.where(torch.isfinite(state.norm), ratio, torch.inf).argmax()
        norm, spread = float(state.norm[worst]), float(state.spread[worst])
        return FrechetMean(point, bool(converged.all()), iterations, norm, spread, each)
