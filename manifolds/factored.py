"""Full-rank pairs of factors modulo GL(h): attention heads, LoRA adapters, linear and diagonal nets."""

from __future__ import annotations

import torch
from torch import Tensor

from manifolds.base import Curve, QuotientManifold, unknown_method
from manifolds.frame import METRICS, PairFrame, frame
from manifolds.linalg import split, widen
from manifolds.logarithm import log_factor_pair


class FactorPair(QuotientManifold):
    r"""Pairs ``G (n, h)``, ``H (m, h)`` of full column rank, modulo ``(G, H) ~ (G A^-1, H A^H)``, A in GL(h).

    The product ``G H^H`` is what the orbit leaves alone.  A point is the stacked tensor ``[G; H]`` of shape
    ``(..., rows + m, h)``, real or complex, with ``rows = n``.  Two GL(h)-invariant metrics, with
    ``M_G = G^H G`` and ``M_H = H^H H`` (Hide & Seek, arXiv 2505.05409, section 4):

        inv:  <u, v> = Re Tr(M_G^-1 u_G^H v_G) + Re Tr(M_H^-1 u_H^H v_H)
        mix:  <u, v> = Re Tr(M_H u_G^H v_G) + Re Tr(M_G u_H^H v_H)

    ``eps > 0`` relaxes them covariantly to ``M_G + eps (M_G # M_H^-1)`` and ``M_H + eps (M_H # M_G^-1)`` with
    the matrix geometric mean ``#`` (derived here; the published ``M + eps I`` is not invariant).

    The metric ``inv`` is complete and its geodesics have a closed form; ``mix`` is incomplete, and a geodesic
    asked for past its domain raises ``ValueError``.  Pairs without full rank are accepted: see
    :meth:`frame`, which reports them.

    >>> manifold = FactorPair(2)
    >>> x = torch.eye(2, dtype=torch.float64).repeat(2, 1)
    >>> u = manifold.proju(x, torch.ones_like(x))
    >>> round(float(manifold.inner(x, u, manifold.vertical(x, torch.ones(2, 2, dtype=torch.float64)))), 12)
    0.0
    """

    name = "FactorPair"
    ndim = 2

    def __init__(self, rows: int, metric: str = "inv", eps: float = 0.0):
        super().__init__()
        if rows < 1:
            raise ValueError(f"FactorPair: rows must be at least 1; got {rows}")
        if metric not in METRICS:
            raise ValueError(f"FactorPair: metric must be one of {', '.join(METRICS)}; got {metric!r}")
        if not 0 <= eps < float("inf"):
            raise ValueError(f"FactorPair: eps must be finite and >= 0; got {eps}")
        self.rows, self.metric, self.eps = rows, metric, eps

    def frame(self, x: Tensor) -> PairFrame:
        """The balanced gauge and orthonormal frame at ``x``, in double precision; ``.deficient`` flags pairs
        without full rank."""
        if x.ndim < 2 or x.shape[-2] <= self.rows:
            raise ValueError(
                f"FactorPair: a point needs more than rows = {self.rows} rows; got shape {tuple(x.shape)}"
            )
        return frame(x, self.rows, self.metric, self.eps)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """``<u, v>`` at ``x``, shape ``(...)`` (``(..., 1, 1)`` with keepdim)."""
        f = self.frame(x)
        z_u = f.coordinates(widen(u))
        z_v = z_u if v is None else f.coordinates(widen(v))
        return (z_u * z_v.conj()).real.sum((-2, -1), keepdim=keepdim).to(x.real.dtype)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Metric-orthogonal projection onto the horizontal space.

        Solves ``P_H^-1 M_G L + L M_H P_G^-1 = u_H^H H P_G^-1 - P_H^-1 G^H u_G`` (the published inv equation
        lacks a transpose) and adds the vertical vector ``(G L, -H L^H)``.
        """
        f = self.frame(x)
        return f.tangent(f.project(f.coordinates(widen(u)))).to(x.dtype)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """The horizontal Riemannian gradient: for inv ``(g_G M_G, g_H M_H)``, projected.

        For a function of ``G H^H`` the projection changes nothing.
        """
        f = self.frame(x)
        return f.tangent(f.project(f.raise_index(widen(u)))).to(x.dtype)

    def vertical(self, x: Tensor, algebra: Tensor) -> Tensor:
        """``(G L, -H L^H)`` for ``L (..., h, h)``."""
        g, h = split(x, self.rows)
        return torch.cat([g @ algebra, -(h @ algebra.mH)], dim=-2)

    def act(self, x: Tensor, a: Tensor) -> Tensor:
        """The group action ``(G A^-1, H A^H)`` of ``A (..., h, h)``."""
        g, h = split(x, self.rows)
        return torch.cat([torch.linalg.solve(a, g, left=False), h @ a.mH], dim=-2)

    def projx(self, x: Tensor) -> Tensor:
        """The representative of the same orbit in the balanced gauge (equal Gram matrices)."""
        return self.frame(x).point.to(x.dtype)

    def christoffel(self, x: Tensor, u: Tensor) -> Tensor:
        """Gamma(u, u) (Hide & Seek, Eq. 11 and 12); by automatic differentiation of the metric if eps > 0."""
        f = self.frame(x)
        return f.restore(f.bend(f.coordinates(widen(u)))).to(x.dtype)

    def geodesic(self, x: Tensor, u: Tensor, method: str = "exact") -> Curve:
        """``t -> c(t)``: "exact" (closed form for inv, adaptive Runge-Kutta otherwise), "taylor2", "linear".

        Raises ``ValueError`` from the curve when a mix geodesic leaves its domain before ``t``.
        """
        if method not in ("exact", "taylor2", "linear"):
            raise unknown_method(method)
        f = self.frame(x)
        z = f.coordinates(widen(u))

        def curve(t: float | Tensor) -> Tensor:
            end = f.restore(f.curve(z, t, method))
            if method == "exact" and (self.metric == "mix" or self.eps):
                _check_domain(end, t)
            return end.to(x.dtype)

        return curve

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The horizontal ``u`` with ``expmap(x, u)`` in the orbit of ``y``, by alignment and shooting.

        Raises ``ValueError`` when no geodesic was found (the points are too far apart, or their products have
        different signs).
        """
        result = log_factor_pair(self, widen(x), widen(y))
        if not bool(result.converged.all()):
            raise ValueError(
                f"FactorPair: no geodesic found for {int((~result.converged).sum())} of {result.converged.numel()} "
                f"pairs (largest miss {float(result.miss.max()):.1e}); the points are too far apart for this metric"
            )
        return result.vector.to(x.dtype)

    def try_logmap(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`logmap` with a mask ``(...)`` of the pairs of points for which a geodesic was found."""
        result = log_factor_pair(self, widen(x), widen(y))
        return result.vector.to(x.dtype), result.converged

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The quotient distance ``|logmap(x, y)|``, a constant for automatic differentiation."""
        return self.norm(x.detach(), self.logmap(x.detach(), y.detach()), keepdim=keepdim)


def _check_domain(end: Tensor, t: float | Tensor) -> None:
    lost = ~torch.isfinite(end.abs()).flatten(-2).all(-1)
    if bool(lost.any()):
        raise ValueError(
            f"FactorPair: the geodesic of {int(lost.sum())} of {lost.numel()} pairs leaves the domain of the metric "
            f"before t = {float(t):g} (a Gram matrix becomes singular); take a smaller step, or the metric inv"
        )


