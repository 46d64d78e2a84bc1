"""Laplace's approximation of the evidence, as a number that no reparametrization changes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from symgeo.hessian.estimate import Estimate, check_tol
from symgeo.hessian.operator import EXACT, HessianOperator, log_plan
from symgeo.hessian.quadrature import log_volume


def laplace_evidence(loss: float, operator: HessianOperator, count: float = 1.0, samples: int | None = None,
                     seed: int = 0, steps: int | None = None, tol: float | None = None) -> Estimate:
    r"""``- N L - 1/2 log det(N G^-1 H)``: the log of the integral of ``e^(-N L)`` over the volume of the metric.

    Up to ``d/2 log(2 pi)``, the same in all coordinates.  With ``operator`` from :func:`invariant_hessian` or
    :func:`riemannian_hessian` at a minimum of the loss (with its prior, if any) the value is the same in every
    parametrization; with the Euclidean Hessian it shifts by ``log |det J|``.

    loss : the mean loss ``L`` at the minimum;  count : ``N``, the number of data points that it is the mean of;
    samples, seed, steps, tol : of :meth:`HessianOperator.logdet`, the tolerance relative to the log-determinant

    Raises ``ValueError`` where the operator is not positive definite: no minimum, or directions that do nothing.
    """
    if not 0 < count < math.inf:
        raise ValueError(f"count must be positive; got {count}")
    scaled, size = operator * count, operator.shape[0]
    check_tol(tol)
    if samples is None and size <= EXACT:
        volume = Estimate(float(_positive_log(scaled.eigvalsh(), operator.name, size).sum()), products=size)
    else:
        volume = log_volume(scaled, 0.0, log_plan(samples, steps, tol, seed),
                            lambda nodes: _positive_log(nodes, operator.name, size))
    return volume.affine(-0.5, -count * float(loss))


def _positive_log(values: Tensor, name: str, size: int) -> Tensor:
    """Logarithms of eigenvalues, or of points between the extreme ones, that must be positive beyond rounding."""
    if not values.numel():
        return values
    smallest, floor = float(values.min()), size * torch.finfo(values.dtype).eps * float(values.abs().max())
    if not smallest > floor:
        raise ValueError(f"laplace_evidence: needed a positive definite {name}; it has an eigenvalue at or below "
                         f"{smallest:.3g}. Find the minimum, quotient out the symmetries, or add a prior")
    return values.log()
