"""The elementwise (adaptive) metric on vectors without zeros: ``sum_i (u_i / x_i)^2``."""

from __future__ import annotations

import torch
from torch import Tensor

from manifolds.base import Curve, QuotientManifold, linear, taylor2, unknown_method


class Elementwise(QuotientManifold):
    """``(R without 0)^n`` with the metric ``<u, v>_x = sum_i u_i v_i / x_i^2`` (derived here).

    In the coordinate ``log |x_i|`` it is flat, so every map has a closed form.  Multiplying coordinates by
    fixed nonzero numbers is an isometry.  Those scalings are not divided out: the vertical space is {0}, and
    every vector is horizontal.

    Points are ``(..., n)``.  An entry that is exactly zero is left out: it adds nothing to ``inner``, tangent
    vectors are 0 there, and the exponential map keeps it 0.

    >>> m = Elementwise(); x = torch.tensor([2.0, -1.0]); u = torch.tensor([2.0, 0.0])
    >>> m.inner(x, u).item(), (m.expmap(x, u) / x).tolist()
    (1.0, [2.7182817459106445, 1.0])
    """

    name = "Elementwise"
    ndim = 1

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """``sum_i u_i v_i / x_i^2`` over the entries with ``x_i != 0``."""
        a = _ratio(u, x)
        return (a * (a if v is None else _ratio(v, x))).sum(-1, keepdim=keepdim)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """``u`` itself, with 0 where ``x`` is 0."""
        return torch.where(x == 0, torch.zeros_like(u), u)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """The Riemannian gradient ``x^2 g``."""
        return x * x * u

    def vertical(self, x: Tensor, algebra: Tensor) -> Tensor:
        """Zero: no continuous group is divided out."""
        return torch.zeros_like(x)

    def christoffel(self, x: Tensor, u: Tensor) -> Tensor:
        """``Gamma(u, u) = -u^2 / x``."""
        return -u * _ratio(u, x)

    def geodesic(self, x: Tensor, u: Tensor, method: str = "exact") -> Curve:
        """``x exp(t u / x)``: no coordinate ever crosses zero.  Also "taylor2" and "linear"."""
        u = self.proju(x, u)
        if method == "exact":
            rate = _ratio(u, x)
            return lambda t: x * torch.exp(t * rate)
        if method == "taylor2":
            return taylor2(x, u, self.christoffel(x, u))
        if method == "linear":
            return linear(x, u)
        raise unknown_method(method)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """``x log(y / x)``.

        Raises ``ValueError`` with the number of components whose signs differ (or where only one of the two
        points is 0, or either is NaN): no geodesic joins them.
        """
        return x * self._log_ratio(x, y)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """``|log(y / x)|``; raises ``ValueError`` where ``logmap`` does."""
        return torch.linalg.vector_norm(self._log_ratio(x, y), dim=-1, keepdim=keepdim)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Parallel transport ``v y / x`` (independent of the path: the metric is flat)."""
        return _ratio(v, x) * y

    def _log_ratio(self, x: Tensor, y: Tensor) -> Tensor:
        apart = torch.sign(x) != torch.sign(y)
        if bool(apart.any()):
            raise ValueError(
                f"no geodesic of Elementwise joins x and y: their signs differ in {int(apart.sum())} of "
                f"{apart.numel()} components"
            )
        ratio = torch.where(x == 0, torch.ones_like(y), y / torch.where(x == 0, torch.ones_like(x), x))
        return torch.log(ratio)


def _ratio(u: Tensor, x: Tensor) -> Tensor:
    """``u / x``, and 0 (with zero derivative) where ``x`` is 0."""
    zero = x == 0
    return torch.where(zero, torch.zeros_like(u), u / torch.where(zero, torch.ones_like(x), x))
