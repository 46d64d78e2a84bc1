"""Curvature of the loss along one geodesic: its 2-jet, without any Hessian."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any, NamedTuple

from manifolds.geodesic import METHODS
from symgeo.distributed import refuse_sharded
from symgeo.functional import Loss, Params
from symgeo.geometry import ParameterManifold
from symgeo.hessian.derivatives import Function, SecondDerivative, differentiable
from symgeo.hessian.space import FlatSpace
from symgeo.sharpness.worst_case import batch_list, evaluate


class Jet(NamedTuple):
    """``L``, ``dL/dt`` and ``d2L/dt2`` at ``t = 0``."""

    value: float
    slope: float
    curvature: float


def geodesic_jet(loss: Loss, params: Params, batches: Iterable[Any], manifold: ParameterManifold, u: Params,
                 geodesic: str = "exact") -> Jet:
    r"""The loss along the geodesic with velocity ``u``, to second order:

        d2/dt2 L(c(t)) = d2L(u, u) - dL(Gamma(u, u)),    c(0) = params, c'(0) = u

    the quadratic form of the covariant Hessian, from derivatives in the one variable ``t``: the forward derivative
    of the reverse one (two nested forward ones are wrong through ``layer_norm`` in torch 2.13).

    geodesic : "exact", or "taylor2" (the same 2-jet); "linear" gives ``d2L(u, u)``.

    >>> import torch
    >>> loss = lambda params, batch: params["w"].log().square().sum()  # w(t) = w e^(t u / w): a parabola in t
    >>> w = {"w": torch.tensor([2.0], dtype=torch.float64)}
    >>> round(geodesic_jet(loss, w, [None], ParameterManifold(w), w).curvature, 12)
    2.0
    """
    if not isinstance(manifold, ParameterManifold):
        raise ValueError(f"manifold must be a symgeo.ParameterManifold; got {type(manifold).__name__}")
    if geodesic not in METHODS:
        raise ValueError(f"geodesic must be one of {', '.join(METHODS)}; got {geodesic!r}")
    refuse_sharded(u, "gather them with full_tensor()")
    chart = manifold.chart(params)
    z = chart.coordinates(u)
    bound = float(z.norm())
    if not isfinite(bound):
        raise ValueError("u: the velocity has entries that are not finite")
    data = batch_list(batches)

    def along(batch: Any) -> Function:
        return lambda time: evaluate(loss, chart.point(z, geodesic, t=time["t"], bound=bound), batch)

    start = {"t": z.new_zeros(())}
    second = SecondDerivative([along(batch) for batch in data], FlatSpace(start))
    with differentiable():
        value = sum(float(f(start).detach()) for f in second.functions) / len(data)
    return Jet(value, float(second.gradient()), float(second(z.new_ones(1, 1))))

