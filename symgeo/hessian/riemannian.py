"""The covariant Hessian on the quotient by the GL, rotary and LoRA groups of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from symgeo.chart import Chart
from symgeo.functional import Loss, Params
from symgeo.geometry import ParameterManifold
from symgeo.hessian.derivatives import SecondDerivative
from symgeo.hessian.horizontal import HorizontalBasis
from symgeo.hessian.operator import HessianOperator
from symgeo.hessian.space import Space
from symgeo.sharpness.worst_case import batch_list, check_invariance, evaluate


class ChartSpace(Space):
    """Metric-orthonormal coordinates of the horizontal space at a point (of the whole tangent space if told so)."""

    def __init__(self, chart: Chart, horizontal: bool = True):
        self.chart, self.basis = chart, HorizontalBasis(chart, horizontal)
        self.size, self.dtype, self.device = self.basis.size, chart.dtype, chart.device

    def tangent(self, z: Tensor) -> Params:
        """The tangent vector at the point as it was given."""
        return self.chart.tangent(self.basis.expand(z.unsqueeze(1)).squeeze(1))

    def coordinates(self, u: Mapping[str, Tensor]) -> Tensor:
        """The coordinates of the horizontal part of ``u``."""
        return self.basis.contract(self.chart.coordinates(dict(u)).unsqueeze(1)).squeeze(1)

    def same(self, other: Space) -> bool:
        """Whether both belong to the same point and metric."""
        if not isinstance(other, ChartSpace) or (self.size, self.chart.order) != (other.size, other.chart.order):
            return False
        a, b = self.chart, other.chart
        if a.adaptive != b.adaptive or list(a.frames) != list(b.frames) or not torch.equal(a.rest, b.rest):
            return False
        return all(x.metric == y.metric and x.eps == y.eps and torch.equal(x.point, y.point)
                   for x, y in zip(a.exact.values(), b.exact.values()))


def riemannian_hessian(loss: Loss, params: Params, batches: Iterable[Any], manifold: ParameterManifold,
                       chunk: int | None = None, check: bool = True) -> HessianOperator:
    r"""The covariant Hessian of the mean loss on the quotient manifold, in a metric-orthonormal horizontal frame.

        <u, Hess L v> = d2L(u, v) - dL(Gamma(u, v)),    u, v horizontal,

    which is the plain Hessian at ``z = 0`` of ``z -> L(x + u - Gamma(u, u) / 2)``, ``u`` with coordinates ``z``: a
    geodesic to second order.  That is how products are taken, forward over reverse; no matrix is formed, and nothing
    is differentiated through an eigenvalue problem.

    Its size is the number of parameters that are not frozen minus ``h^2`` for each pair (minus ``d / 2`` complex
    numbers for a rotary group of size d): the dimension of the quotient.  Batches of pairs of which one lacks full
    rank keep all their coordinates, the vertical ones as zeros.  Spectrum, trace and determinant are invariant along
    the orbits of the groups of the manifold, at any point, to rounding.  Coordinates refer to the balanced gauge;
    ``operator @ u`` takes and gives tangent vectors at ``params`` as they are.

    Raises ``SymmetryError`` when the loss is not invariant under the declared groups, and ``ValueError`` as
    :func:`euclidean_hessian` does.

    >>> from symgeo import Symmetry, groups
    >>> net = {"u": torch.tensor([1.0], dtype=torch.float64), "v": torch.tensor([2.0], dtype=torch.float64)}
    >>> gauge = Symmetry({"u": "(h e)", "v": "(h e*)"}, {"e": groups.GeneralLinear(per="h")}, sizes={"e": 1})
    >>> loss = lambda params, batch: (params["u"] * params["v"] - batch).square().sum()
    >>> operator = riemannian_hessian(loss, net, [2.0], ParameterManifold(net, gauge))
    >>> operator.shape, round(operator.trace().value, 12)  # (d/dt)^2 (p e^(sqrt(2) t) - y)^2 = 4 y^2 at p = y
    ((1, 1), 16.0)
    """
    return covariant_hessian(loss, params, batches, manifold, True, True, chunk, check)


def covariant_hessian(loss: Loss, params: Params, batches: Iterable[Any], manifold: ParameterManifold,
                      horizontal: bool, connection: bool, chunk: int | None, check: bool) -> HessianOperator:
    """The Hessian of a manifold with or without its connection term, on its horizontal or whole tangent space."""
    if not isinstance(manifold, ParameterManifold):
        raise ValueError(f"manifold must be a symgeo.ParameterManifold; got {type(manifold).__name__}")
    data = batch_list(batches)
    params = {name: p.detach() for name, p in params.items()}
    space = ChartSpace(manifold.chart(params), horizontal)
    method = "taylor2" if connection else "linear"
    second = SecondDerivative([_along(loss, space.chart, batch, method) for batch in data], space.chart.origin())
    if check:
        second.verified()
        for batch in data:
            check_invariance(loss, params, space.chart, batch)

    def product(v: Tensor) -> Tensor:
        return space.basis.contract(second(space.basis.expand(v)))

    name = f"Riemannian Hessian ({manifold.metric})" if horizontal else f"G^-1 Hessian ({manifold.metric})"
    return HessianOperator(product, space, name, chunk)


def _along(loss: Loss, chart: Chart, batch: Any, method: str) -> Callable[[Tensor], Tensor]:
    return lambda z: evaluate(loss, chart.point(z, method), batch)
