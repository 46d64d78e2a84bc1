"""The covariant Hessian on the quotient by the GL, rotary and LoRA groups of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from symgeo.chart import Chart, Pieces
from symgeo.functional import Loss, Params
from symgeo.geometry import ParameterManifold
from symgeo.hessian.derivatives import Linear
from symgeo.hessian.horizontal import HorizontalBasis
from symgeo.hessian.matrices import second_derivative
from symgeo.hessian.operator import HessianOperator
from symgeo.hessian.space import FlatSpace, Space
from symgeo.sharpness.worst_case import batch_list, check_invariance


class ChartSpace(Space):
    """Metric-orthonormal coordinates of the horizontal space at a point (of the whole tangent space if told so)."""

    def __init__(self, chart: Chart, horizontal: bool = True):
        self.chart, self.basis = chart, HorizontalBasis(chart, horizontal)
        self.size, self.dtype, self.device = self.basis.size, chart.dtype, chart.device

    def tangent(self, z: Tensor) -> Params:
        """The tangent vector at the point as it was given."""
        return self.chart.tangent(self.chart.join(*self.basis.expand(z.unsqueeze(1))).squeeze(0))

    def coordinates(self, u: Mapping[str, Tensor]) -> Tensor:
        """The coordinates of the horizontal part of ``u``."""
        return self.basis.contract(self.chart.pieces(self.chart.coordinates(dict(u)).unsqueeze(0))).squeeze(1)

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
    geodesic to second order.  Products are those of the chain rule, ``E^T (d2L - dL Gamma) E`` with the frame ``E``:
    one product with the plain Hessian of the loss, in the balanced gauge, and for the connection small products of
    the pairs.  No matrix is formed, and nothing is differentiated through an eigenvalue problem.

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
    chart = space.chart
    balanced = chart.point(chart.origin(), "linear")
    moving = {name: balanced[name] for name in chart.layout.shapes}
    flat, second = second_derivative(lambda moved, batch: loss(chart.complete(moved), batch), moving, data)
    if check:
        second.verified()
        for batch in data:
            check_invariance(loss, params, chart, batch)
    frame = BalancedFrame(space, flat, second.gradient() if connection else None)
    name = f"Riemannian Hessian ({manifold.metric})" if horizontal else f"G^-1 Hessian ({manifold.metric})"
    return HessianOperator(lambda v: frame.congruent(second, v), space, name, chunk)


class BalancedFrame:
    """The orthonormal frame ``E`` at the balanced point, as a map into the flat order of the parameters."""

    def __init__(self, space: ChartSpace, flat: FlatSpace, gradient: Tensor | None):
        self.basis, self.chart, self.flat = space.basis, space.chart, flat
        self.slope = None if gradient is None else self.chart.covector(flat.cut(gradient))

    def congruent(self, hessian: Linear, v: Tensor) -> Tensor:
        """``E^T (H - dL Gamma) E v`` for columns ``v``; ``E^T H E v`` where no gradient was given."""
        exact = torch.autocast(self.chart.device.type, enabled=False)  # only the loss may run in low precision
        with exact:
            z = self.basis.expand(v)
        image = self._back(hessian(self._there(z)))
        with exact:
            return self.basis.contract(image if self.slope is None else self.chart.bent(image, self.slope, z))

    def _there(self, z: Pieces) -> Tensor:
        """Vectors with coordinates ``z``, ``k`` rows, as columns in flat order."""
        def one(z: Pieces) -> Tensor:
            return self.flat.coordinates(self.chart.velocity(z))

        rest, pairs = z
        if len(rest) == 1:
            return one((rest[0], {name: pair[0] for name, pair in pairs.items()})).unsqueeze(1)
        return vmap(one)(z).T

    def _back(self, w: Tensor) -> Pieces:
        """Columns of covectors in flat order as coordinates, ``k`` rows."""
        def one(w: Tensor) -> Pieces:
            return self.chart.covector(self.flat.cut(w))

        if w.shape[1] == 1:
            rest, pairs = one(w.squeeze(1))
            return rest.unsqueeze(0), {name: pair.unsqueeze(0) for name, pair in pairs.items()}
        return vmap(one, in_dims=1)(w)
