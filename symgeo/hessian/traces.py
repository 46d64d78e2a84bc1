"""Traces and diagonals from products with random vectors, with their standard errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from symgeo.hessian.estimate import Estimate, TensorEstimate, check_tol, mean_estimate, refine, student
from symgeo.sharpness.result import check_count

_BLOCK = 64  # columns in memory at once
_FIRST = 24  # products of the first round
_FOLDS = 48  # parts of the sketch that XTrace leaves out in turn for its error


def trace(operator: Any, samples: int | None, seed: int, method: str, tol: float | None) -> Estimate:
    """The trace of a symmetric operator; see the methods.  ``ValueError`` for an unknown one or too few samples.

    With ``tol`` in rounds, until the standard error is within ``tol`` of the value, or ``samples``
    products are used up (default: d, for which the trace is exact).  As many samples as coordinates: exact.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    size, (estimator, needed) = operator.shape[0], METHODS[method]
    budget = size if samples is None else check_count("samples", samples)
    if samples is not None and budget < needed:
        raise ValueError(f"method={method!r} needs samples >= {needed}; got {samples}")
    if (check_tol(tol) is None and budget >= size) or size <= max(_FIRST, needed) <= budget:
        return _exact(operator, 0)
    run = estimator(operator, torch.Generator().manual_seed(seed))
    last: list[Estimate] = []

    def measure(total: int) -> Estimate:
        last[:] = [run(total)]
        return last[0]

    fallback = (lambda: _exact(operator, last[0].products)) if budget >= size else None
    found, converged = refine(measure, max(_FIRST, needed), budget, tol, lambda e: (e.stderr, abs(e.value)), fallback)
    return Estimate(found.value, found.stderr, found.samples, found.products, converged)


def _exact(operator: Any, used: int) -> Estimate:
    return Estimate(float(exact_diagonal(operator).double().sum()), products=used + operator.shape[0])


def diagonal(operator: Any, samples: int | None, seed: int, tol: float | None) -> TensorEstimate:
    """The diagonal: exact by d products, or the mean of ``v * (S v)`` over random signs ``v``.

    With ``tol`` in rounds, until the norm of the standard errors is within ``tol`` of the norm of the diagonal.
    """
    size = operator.shape[0]
    budget = size if samples is None else check_count("samples", samples)

    def exact(used: int) -> TensorEstimate:
        value = exact_diagonal(operator)
        return TensorEstimate(value, torch.zeros_like(value), 0, used + size, True)

    if (check_tol(tol) is None and budget >= size) or size <= _FIRST <= budget:
        return exact(0)
    run, last = _Moments(operator, torch.Generator().manual_seed(seed)), [0]

    def measure(total: int) -> TensorEstimate:
        last[0] = total
        return run(total)

    def sizes(found: TensorEstimate) -> tuple[float, float]:
        return float(found.stderr.norm()), float(found.value.norm())

    fallback = (lambda: exact(last[0])) if budget >= size else None
    found, converged = refine(measure, _FIRST, budget, tol, sizes, fallback)
    return TensorEstimate(found.value, found.stderr, found.samples, found.products, converged)


class _Moments:
    """Mean and spread of ``v * (S v)``, entry by entry, kept as running sums."""

    def __init__(self, operator: Any, generator: torch.Generator):
        self.operator, self.generator, self.count = operator, generator, 0
        self.mean = torch.zeros(operator.shape[0], dtype=operator.dtype, device=operator.device)
        self.square = torch.zeros_like(self.mean)

    def __call__(self, total: int) -> TensorEstimate:
        while self.count < total:
            width = min(_BLOCK, total - self.count, max(1, self.operator.chunk))
            v = signs(self.operator, width, self.generator)
            draws = v * (self.operator @ v)
            mean, share = draws.mean(1), width / (self.count + width)
            shift = mean - self.mean
            self.square += (draws - mean.unsqueeze(1)).square().sum(1) + shift.square() * (self.count * share)
            self.mean += shift * share
            self.count += width
        variance = self.square / max(total - 1, 1)
        error = variance.sqrt() * (student(total) / total**0.5) if total > 1 else torch.full_like(variance, torch.inf)
        return TensorEstimate(self.mean.clone(), error, total, total)


def exact_diagonal(operator: Any) -> Tensor:
    """The diagonal ``(d,)``, by d products."""
    size, pieces = operator.shape[0], [torch.zeros(0, dtype=operator.dtype, device=operator.device)]
    for start in range(0, size, _BLOCK):
        width = min(_BLOCK, size - start)
        unit = torch.zeros(size, width, dtype=operator.dtype, device=operator.device)
        unit[start:start + width] = torch.eye(width, dtype=operator.dtype, device=operator.device)
        pieces.append((operator @ unit)[start:start + width].diagonal())
    return torch.cat(pieces)


def signs(operator: Any, count: int, generator: torch.Generator) -> Tensor:
    """Independent random signs ``(d, count)``."""
    bits = torch.randint(0, 2, (operator.shape[0], count), generator=generator)
    return (2 * bits - 1).to(operator.device, operator.dtype)


def sphere(operator: Any, count: int, generator: torch.Generator) -> Tensor:
    """Independent vectors ``(d, count)``, uniform on the sphere of radius ``sqrt(d)``."""
    v = torch.randn(operator.shape[0], count, generator=generator, dtype=torch.float64)
    return (v * (operator.shape[0] ** 0.5 / v.norm(dim=0))).to(operator.device, operator.dtype)


class Hutchinson:
    """``mean v^T S v`` over random signs (Hutchinson 1989); ``samples`` products."""

    def __init__(self, operator: Any, generator: torch.Generator):
        self.operator, self.generator = operator, generator
        self.draws = torch.zeros(0, dtype=torch.float64, device=operator.device)

    def __call__(self, samples: int) -> Estimate:
        while len(self.draws) < samples:
            v = signs(self.operator, min(_BLOCK, samples - len(self.draws)), self.generator)
            self.draws = torch.cat([self.draws, (v * (self.operator @ v)).sum(0).double()])
        return mean_estimate(self.draws, samples)


class Sketch:
    """``Y = S Omega = Q R`` and ``S Q``, to which columns can be added."""

    def __init__(self, operator: Any):
        self.operator = operator
        none = torch.zeros(operator.shape[0], 0, dtype=operator.dtype, device=operator.device)
        self.omega = self.image = self.q = self.sq = none

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.omega.shape[1]

    def grow(self, omega: Tensor) -> None:
        """More columns of ``Omega``; two products for each."""
        image = self.operator @ omega
        fresh = image
        for _ in range(3):  # what rounding leaves of columns that add nothing is cleared by the last passes
            fresh = torch.linalg.qr(fresh - self.q @ (self.q.T @ fresh)).Q
        self.omega, self.image = torch.cat([self.omega, omega], 1), torch.cat([self.image, image], 1)
        self.q, self.sq = torch.cat([self.q, fresh], 1), torch.cat([self.sq, self.operator @ fresh], 1)

    def rest(self, v: Tensor, image: Tensor) -> Tensor:
        """``v^T (I - Q Q^T) S (I - Q Q^T) v`` for columns ``v`` with ``image = S v``."""
        w = self.q.T @ v
        inner = (v * image).sum(0) - 2 * (w * (self.sq.T @ v)).sum(0)
        return (inner + (w * (self.q.T @ self.sq @ w)).sum(0)).double()


class HutchPP:
    """Hutch++ (Meyer et al., arXiv 2010.09649): the trace on a sketched range, and Hutchinson off it.

    A third of the products each for the sketch ``Q = orth(S X)``, for ``tr Q^T S Q``, and for the rest; five at least
    for the rest, from which the error comes.
    """

    def __init__(self, operator: Any, generator: torch.Generator):
        self.sketch, self.operator = Sketch(operator), operator
        self.ranges, self.probes = generator, torch.Generator().manual_seed(generator.initial_seed() + 1)
        self.v = self.image = self.sketch.omega

    def __call__(self, samples: int) -> Estimate:
        width = min(samples // 3, (samples - 5) // 2)
        if width > self.sketch.width:
            self.sketch.grow(signs(self.operator, width - self.sketch.width, self.ranges))
        more = samples - 2 * width - self.v.shape[1]
        v = signs(self.operator, more, self.probes)
        self.v, self.image = torch.cat([self.v, v], 1), torch.cat([self.image, self.operator @ v], 1)
        rest = mean_estimate(self.sketch.rest(self.v, self.image))
        return Estimate(float((self.sketch.q * self.sketch.sq).sum()) + rest, rest.stderr, self.v.shape[1], samples)


class XTrace:
    """XTrace (Epperly, Tropp, Webber, arXiv 2301.07825): each vector tests the sketch made by all others.

    With ``Y = S W = Q R`` for m vectors ``w_i`` uniform on the sphere, ``H = Q^T S Q`` and ``s_i`` the normalised i-th
    column of ``R^-T``, which is the direction in the range of ``Q`` that the i-th vector alone contributes, the i-th
    estimate is

        tr H - s_i^T H s_i + (d - m + 1) / (|w_i|^2 - |c_i|^2) (c_i^T H c_i - 2 c_i^T r_i + w_i^T S w_i),
        c_i = (I - s_i s_i^T) Q^T w_i,

    and the result their mean.  The estimates share all but two of their vectors, so that their spread says too little:
    the standard error is the jackknife's, which leaves out parts of the sketch and which the inequality of Efron and
    Stein keeps from being too small on average.  Where the sketch spans the range of ``S`` to rounding, fresh vectors
    test that, as in Hutch++.
    """

    def __init__(self, operator: Any, generator: torch.Generator):
        self.sketch, self.operator, self.generator = Sketch(operator), operator, generator
        self.extra = 0

    def __call__(self, samples: int) -> Estimate:
        sketch, size = self.sketch, self.operator.shape[0]
        if samples // 2 > sketch.width:
            sketch.grow(sphere(self.operator, samples // 2 - sketch.width, self.generator))
        count, q = sketch.width, sketch.q
        h, r, w = (q.T @ sketch.sq).double(), (q.T @ sketch.image).double(), (q.T @ sketch.omega).double()
        pivots, eps = torch.linalg.qr(r).R.diagonal().abs(), torch.finfo(q.dtype).eps
        if float(pivots.min()) <= count * eps * float(pivots.max()):
            return self._spanned()
        own = (sketch.omega * sketch.image).sum(0).double()
        value = _leave_one_out(h, r, w, own, size).mean()
        folds, without = torch.arange(count).chunk(_FOLDS), []
        for fold in folds:
            kept = torch.ones(count, dtype=torch.bool)
            kept[fold] = False
            basis, part = torch.linalg.qr(r[:, kept])
            without.append(_leave_one_out(basis.T @ h @ basis, part, basis.T @ w[:, kept], own[kept], size).mean())
        spread = float(torch.stack(without).var(unbiased=False)) * (len(folds) - 1)
        return Estimate(float(value), student(len(folds)) * spread**0.5, count, 2 * count + self.extra)

    def _spanned(self) -> Estimate:
        """The sketch's trace, and what eight fresh vectors see beside it."""
        v = sphere(self.operator, 8, self.generator)
        rest = mean_estimate(self.sketch.rest(v, self.operator @ v))
        self.extra += 8
        value = float((self.sketch.q * self.sketch.sq).sum()) + rest
        return Estimate(value, rest.stderr, self.sketch.width, 2 * self.sketch.width + self.extra)


def _leave_one_out(h: Tensor, r: Tensor, w: Tensor, own: Tensor, size: int) -> Tensor:
    """The estimates of `XTrace`, in coordinates of the range: ``own_i = w_i^T S w_i``, all ``|w_i|^2 = size``."""
    s = torch.linalg.inv(r).T
    s = s / s.norm(dim=0)
    c = w - s * (s * w).sum(0)
    rest = (c * (h @ c)).sum(0) - 2 * (c * r).sum(0) + own
    return h.trace() - (s * (h @ s)).sum(0) + (size - r.shape[1] + 1) / (size - c.square().sum(0)) * rest


Method = tuple[Callable[[Any, torch.Generator], Callable[[int], Estimate]], int]
#: the estimators, with the fewest products that they work from
METHODS: dict[str, Method] = {"hutchinson": (Hutchinson, 1), "hutch++": (HutchPP, 7), "xtrace": (XTrace, 4)}
