"""Laplace's approximation of the evidence, as a number that no reparametrization changes."""

from __future__ import annotations

import torch
from torch import Tensor

from symgeo.hessian.estimate import Estimate
from symgeo.hessian.lanczos import trace_of
from symgeo.hessian.operator import EXACT, HessianOperator


def laplace_evidence(loss: float, operator: HessianOperator, count: float = 1.0, samples: int | None = None,
                     seed: int = 0, steps: int = 64) -> Estimate:
    r"""``- N L - 1/2 log det(N G^-1 H)``: the log of the integral of ``e^(-N L)`` over the volume of the metric.

    Up to ``d/2 log(2 pi)``, the same in all coordinates.  With ``operator`` from :func:`invariant_hessian` or
    :func:`riemannian_hessian` at a minimum of the loss (with its prior, if any) the value is the same in every
    parametrization; with the Euclidean Hessian it shifts by ``log |det J|``.

    loss : the mean loss ``L`` at the minimum;  count : ``N``, the number of data points that it is the mean of;
    samples, seed, steps : of :meth:`HessianOperator.logdet`

    Raises ``ValueError`` where the operator is not positive definite: no minimum, or directions that do nothing.
    """
    if not count > 0:
        raise ValueError(f"count must be positive; got {count}")
    scaled = operator * count
    if samples is None and operator.shape[0] <= EXACT:
        volume = Estimate(float(_positive_log(scaled.eigvalsh(), operator.name).sum()))
    else:
        volume = trace_of(scaled, lambda nodes: _positive_log(nodes, operator.name), samples or 16, steps, seed)
    return Estimate(-count * float(loss) - 0.5 * volume, 0.5 * volume.stderr, volume.samples)


def _positive_log(values: Tensor, name: str) -> Tensor:
    """Logarithms of eigenvalues, or of points between the extreme ones, that must be positive beyond rounding."""
    smallest, floor = float(values.min()), values.numel() * torch.finfo(values.dtype).eps * float(values.abs().max())
    if not smallest > floor:
        raise ValueError(f"laplace_evidence: needed a positive definite {name}; it has an eigenvalue at or below "
                         f"{smallest:.3g}. Find the minimum, quotient out the symmetries, or add a prior")
    return values.log()
