"""Means of weights under Kronecker metrics, by matrix-free conjugate gradients.

The mean of ``W_i`` with constant metrics ``<X, Y>_i = Tr(X^T L_i Y R_i)`` solves a linear system in ``m n`` unknowns,

    ``sum_i c_i L_i W R_i = sum_i c_i L_i W_i R_i``,

which contains RegMean, ``L_i = I`` (arXiv 2212.09849; the system follows from the quadratic form of arXiv 2602.17385
and is derived here).  That paper merges the metrics themselves to ``(sum_i c_i L_i) (x) (sum_i c_i R_i)``: not the
operator of this system, but a good preconditioner for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from manifolds.linalg import eigh, widen
from symgeo.merge.metrics import KroneckerMetric
from symgeo.merge.problem import ROUNDING, check_weights


@dataclass(frozen=True)
class KroneckerMean:
    """Result of :func:`kronecker_mean`.

    point : ``(..., m, n)``;  converged, iterations, residual : ``(...)``, the last one relative to the largest term of
    the right-hand side, in the norm of the preconditioner, which no change of coordinates alters.
    """

    point: Tensor
    converged: Tensor
    iterations: Tensor
    residual: Tensor


@torch.no_grad()
def kronecker_mean(
    points: Sequence[Tensor],
    metrics: Sequence[KroneckerMetric],
    coefficients: Sequence[float] | None = None,
    tol: float = 1e-10,
    max_iter: int = 1000,
) -> KroneckerMean:
    """``argmin_W sum_i c_i <W - W_i, W - W_i>_i`` in float64, with products by the factors of the metrics only.

    points : ``W_i (..., m, n)``;  metrics : one per point;  coefficients : ``c_i >= 0``, normalised (default ``1/N``).
    With the preconditioner ``(sum_i c_i L_i) (x) (sum_i c_i R_i)`` every iterate is equivariant: where ``W_i`` becomes
    ``M W_i N^-1`` and the metrics move along, so does the result.  Where all ``L_i`` or all ``R_i`` are equal, as in
    RegMean, the preconditioner is exact: one step solves the system.  Directions that no metric sees keep the weighted
    average of the points.

    Raises ``ValueError`` for a wrong number of metrics, for shapes that do not fit and for metrics that are not
    positive semidefinite.  A system that is not solved to ``tol`` is reported as not converged.

    >>> eye = torch.eye(1); points = [0 * eye, 4 * eye]
    >>> kronecker_mean(points, [KroneckerMetric(eye, eye), KroneckerMetric(eye, 3 * eye)]).point
    tensor([[3.]])
    """
    check_metrics([tuple(w.shape[-2:]) for w in points], metrics)
    system = System.of(points, metrics, check_weights(coefficients, len(points), mean=True))
    x = torch.stack([c * w for c, w in zip(system.weights, system.points)]).sum(0)
    terms = torch.stack([c * m.lower(w) for c, m, w in zip(system.weights, system.metrics, system.points)])
    reference = (terms * system.precondition(terms)).sum((-2, -1)).amax(0).sqrt()
    x, iterations = _solve(system, x, 0.5 * tol * reference, max_iter)
    size = system.size(system.residual(x))
    residual = torch.where(size > 0, size / reference, 0.0)
    return KroneckerMean(x.to(points[0].dtype), residual <= tol, iterations, residual)


def _solve(system: System, x: Tensor, target: Tensor, max_iter: int) -> tuple[Tensor, Tensor]:
    """Preconditioned conjugate gradients; batch elements whose residual is below ``target (...)`` stand still."""
    r = system.residual(x)
    p = z = system.precondition(r)
    square = (r * z).sum((-2, -1))
    iterations = torch.zeros_like(square, dtype=torch.long)
    for _ in range(max_iter):
        active = square.clamp_min(0.0).sqrt() > target
        if not bool(active.any()):
            break
        image = system.apply(p)
        curvature = (p * image).sum((-2, -1))
        active &= curvature > 0
        step = torch.where(active, square / curvature.where(active, 1.0), 0.0)[..., None, None]
        x, r = x + step * p, r - step * image
        z = system.precondition(r)
        previous, square = square, (r * z).sum((-2, -1))
        p = z + torch.where(active, square / previous.where(active, 1.0), 0.0)[..., None, None] * p
        iterations += active
    return x, iterations


class Spectrum(NamedTuple):
    """A symmetric positive semidefinite matrix by eigenvalues ``(..., n)`` and eigenvectors; None for the identity."""

    decomposition: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, matrix: Tensor | None, name: str) -> Spectrum:
        """Raises ``ValueError`` if ``matrix``, described by ``name``, has a negative eigenvalue beyond rounding."""
        if matrix is None:
            return cls(None)
        values, vectors = eigh(matrix)
        if bool((values[..., 0] < -1e-6 * values[..., -1].abs()).any()):
            raise ValueError(
                f"metrics: {name} must be positive semidefinite; it has eigenvalues from {float(values.min()):.2e} "
                f"to {float(values.max()):.2e}"
            )
        return cls((values, vectors))

    def power(self, p: float, x: Tensor) -> Tensor:
        """``C^p x`` for ``x (..., n, q)``, a pseudo-inverse for negative ``p``."""
        if self.decomposition is None:
            return x
        values, vectors = self.decomposition
        kept = values > ROUNDING * values[..., -1:]
        powers = torch.where(kept, values.where(kept, 1.0).pow(p), 0.0)
        return vectors @ (powers.unsqueeze(-1) * (vectors.mT @ x))


class System(NamedTuple):
    """The normal equations of a mean, everything in float64, and the spectra of both sums of factors."""

    points: list[Tensor]
    metrics: list[KroneckerMetric]
    weights: list[float]
    left: Spectrum
    right: Spectrum

    @classmethod
    def of(cls, points: Sequence[Tensor], metrics: Sequence[KroneckerMetric], weights: Sequence[float]) -> System:
        """Raises ``ValueError`` for sums of factors that are not positive semidefinite."""
        wide = [KroneckerMetric(None if m.left is None else widen(m.left), widen(m.right)) for m in metrics]
        right = torch.stack([c * m.right for c, m in zip(weights, wide)]).sum(0)
        left = None
        if any(m.left is not None for m in wide):
            eye = torch.eye(points[0].shape[-2], dtype=right.dtype, device=right.device)
            parts = torch.broadcast_tensors(*[eye if m.left is None else m.left for m in wide])
            left = torch.stack([c * part for c, part in zip(weights, parts)]).sum(0)
        spectra = Spectrum.of(left, "the sum of the left factors"), Spectrum.of(right, "the sum of the right factors")
        return cls([widen(w) for w in points], wide, list(weights), *spectra)

    def apply(self, x: Tensor) -> Tensor:
        """``sum_i c_i L_i X R_i``."""
        return torch.stack([c * m.lower(x) for c, m in zip(self.weights, self.metrics)]).sum(0)

    def residual(self, x: Tensor) -> Tensor:
        """``sum_i c_i L_i (W_i - X) R_i``."""
        parts = zip(self.weights, self.metrics, self.points)
        return torch.stack([c * metric.lower(w - x) for c, metric, w in parts]).sum(0)

    def precondition(self, r: Tensor) -> Tensor:
        """``(sum_i c_i L_i)^-1 r (sum_i c_i R_i)^-1``."""
        return self.right.power(-1.0, self.left.power(-1.0, r).mT).mT

    def size(self, r: Tensor) -> Tensor:
        """The norm of a covector that belongs to the preconditioner, shape ``(...)``."""
        return (r * self.precondition(r)).sum((-2, -1)).clamp_min(0.0).sqrt()


def check_metrics(shapes: Sequence[tuple[int, ...]], metrics: Sequence[KroneckerMetric]) -> None:
    """Raises ``ValueError`` unless there is one metric for every weight of shape ``(m, n)``, and it fits."""
    if not shapes:
        raise ValueError("points: needed at least one; got none")
    if len(metrics) != len(shapes):
        raise ValueError(f"metrics: needed one per adapter or point, {len(shapes)}; got {len(metrics)}")
    for i, ((rows, columns), metric) in enumerate(zip(shapes, metrics)):
        if (rows, columns) != shapes[0]:
            raise ValueError(f"points[{i}]: has shape {(rows, columns)}, but the first one {shapes[0]}")
        found = rows if metric.left is None else metric.left.shape[-1], metric.right.shape[-1]
        if found != (rows, columns):
            raise ValueError(f"metrics[{i}]: factors of sizes {found} do not fit weights of shape {(rows, columns)}")
