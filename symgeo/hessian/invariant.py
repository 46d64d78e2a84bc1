"""The covariant Hessian of a loss in any metric on parameter space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp

from symgeo.functional import Loss, Params
from symgeo.geometry import ParameterManifold
from symgeo.hessian.derivatives import Columns
from symgeo.hessian.frames import Frame
from symgeo.hessian.matrices import second_derivative
from symgeo.hessian.metrics import Matrix, MatrixMetric, Metric
from symgeo.hessian.operator import HessianOperator
from symgeo.hessian.riemannian import covariant_hessian
from symgeo.hessian.space import FlatSpace, Space

Lower = Callable[[Tensor, Tensor], Tensor]


class FrameSpace(Space):
    """Coordinates in the columns of ``E = G^-1/2``: vectors ``u = E y``."""

    def __init__(self, flat: FlatSpace, frame: Frame):
        self.flat, self.frame = flat, frame
        self.size, self.dtype, self.device = frame.size, flat.dtype, flat.device

    def tangent(self, z: Tensor) -> Params:
        """``E z``."""
        return self.flat.tangent(self.frame.expand(z.unsqueeze(1)).squeeze(1))

    def coordinates(self, u: Mapping[str, Tensor]) -> Tensor:
        """``E^+ u``."""
        return self.frame.coordinates(self.flat.coordinates(u).unsqueeze(1)).squeeze(1)

    def same(self, other: Space) -> bool:
        """Equal parameters, and frames that agree on a vector that no frame leaves alone by accident."""
        if not isinstance(other, FrameSpace) or self.size != other.size or not self.flat.same(other.flat):
            return False
        probe = torch.linspace(1, 2, self.size, dtype=self.dtype, device=self.device).sin().unsqueeze(1)
        return torch.equal(self.frame.expand(probe), other.frame.expand(probe))


def invariant_hessian(loss: Loss, params: Params, batches: Iterable[Any], metric: Matrix | Tensor | Metric |
                      ParameterManifold, connection: bool = True, pinv: bool = False, chunk: int | None = None,
                      check: bool = True) -> HessianOperator:
    r"""The Hessian as a map of tangent vectors: ``G^-1 (d2L - Gamma dL)``, which no reparametrization changes.

    Given in the symmetric form ``G^-1/2 (d2L - Gamma dL) G^-1/2``, which is similar to it, so that eigenvalues,
    trace and determinant are those of the map; ``operator @ u`` with ``u`` as Params is the map itself, and
    eigenvectors are tangent vectors with ``v^T G v = 1``.  ``connection=False`` gives ``G^-1 d2L``, a map only at
    critical points (Kristiadi, Dangel, Hennig, arXiv 2302.07384).

    metric : ``Params -> (d, d)`` or ``(d,)`` (a diagonal) in flat order, such a tensor (constant), a ``Metric``
        (:func:`kronecker_metric`), or a `ParameterManifold`, whose whole tangent space is taken;
        :func:`pullback_metric` and :func:`fisher_metric` make functions
    pinv : for a singular metric the pseudo-inverse, restricted to its range: the size is the rank

    The connection is contracted with ``a = G^-1 dL`` before anything is formed,

        Gamma dL v = (D(G a)^T v + D(G a) v - D_a G v) / 2,

    by derivatives of products with the metric.  The metric may be differentiated by any mode but, through
    ``layer_norm``, must not contain forward-mode derivatives itself (torch 2.13 then returns wrong ones).

    Raises ``ValueError`` for a metric of the wrong shape, indefinite, or singular without ``pinv``.

    >>> loss = lambda params, batch: params["s"].exp().sum()
    >>> metric = lambda params: (2 * params["s"]).exp()      # w = e^s with the flat metric: the loss is linear in w
    >>> s = {"s": torch.tensor([0.3, -1.0], dtype=torch.float64)}
    >>> round(invariant_hessian(loss, s, [None], metric).dense().abs().max().item(), 12)
    0.0
    """
    if isinstance(metric, ParameterManifold):
        return covariant_hessian(loss, params, batches, metric, False, connection, chunk, check)
    if not (isinstance(metric, (Tensor, Metric)) or callable(metric)):
        raise ValueError(f"metric must be a tensor, a function of Params, a Metric or a ParameterManifold; "
                         f"got {type(metric).__name__}")
    chosen = metric if isinstance(metric, Metric) else MatrixMetric(metric)
    flat, second = second_derivative(loss, params, batches)
    space = FrameSpace(flat, chosen.frame(flat, pinv))
    if check:
        second.verified()
    slope = space.frame.contract(second.gradient().unsqueeze(1))
    bend = None
    if connection:
        raised = space.frame.expand(slope).squeeze(1)
        bend = Columns([contracted_connection(lambda x, u: chosen.lower(flat, x, u), flat.point, raised)])

    def product(y: Tensor) -> Tensor:
        v = space.frame.expand(y)
        image = second(v) if bend is None else second(v) - bend(v)
        return space.frame.contract(image)

    name = "covariant Hessian" if connection else "G^-1 Hessian"
    return HessianOperator(product, space, name, chunk).verified(check, float(slope.norm()))


def contracted_connection(lower: Lower, x: Tensor, a: Tensor) -> Callable[[Tensor], Tensor]:
    """``v -> sum_k Gamma_{k, ij} a^k v^j``, with ``Gamma_{k, ij} = (d_i G_jk + d_j G_ik - d_k G_ij) / 2``.

    lower : ``(x, u) -> G(x) u``
    """
    def product(v: Tensor) -> Tensor:
        pulled = grad(lambda y: (lower(y, a) * v).sum())(x)
        pushed = jvp(lambda y: lower(y, a), (x,), (v,))[1]
        along = jvp(lambda y: lower(y, v), (x,), (a,))[1]
        return 0.5 * (pulled + pushed - along)

    return product
