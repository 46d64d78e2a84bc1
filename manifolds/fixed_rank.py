"""Matrices of fixed rank with the Frobenius metric, as matrices or as stacked pairs of factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manifolds.base import Curve, QuotientManifold, unknown_method
from manifolds.embedded import EmbeddedFrame, Sides, dense_frame, stacked_frame
from manifolds.embedded_logarithm import log_embedded
from manifolds.linalg import split, widen
from manifolds.low_rank import LowRank, svd_of_product, truncate


class FixedRank(QuotientManifold):
    r"""The matrices of rank r in ``R^{m x n}``, a submanifold with the Frobenius metric ``<u, v> = Tr u^T v``.

    A point is either the matrix itself, ``(..., m, n)`` (``rows=None``, for small matrices), or a stacked pair
    ``[G; H]`` of shape ``(..., rows + n, r)`` with ``rows = m``, which stands for ``G H^T``; then no matrix of
    size ``m x n`` is ever formed, and vectors are stacked pairs ``[X; Y]`` too, which stand for
    ``X H^T + G Y^T``.

    Matrices: ``proju`` is ``P_T(u) = U U^T u + u V V^T - U U^T u V V^T``, the group is trivial, and every map
    sees the tangent part of its vectors only (``inner`` excepted, which is the Frobenius product).

    Pairs: modulo ``(G, H) ~ (G A^-1, H A^T)``.  Horizontal vectors are those of the metric ``mix`` of
    :class:`manifolds.FactorPair`, ``G^+ X = (H^+ Y)^T``; there ``<u, v>`` is the Frobenius product of the
    matrices.  In general it is, with ``G G^+``, ``H H^+`` the projections onto the columns,

        <u, u> = |X H^T + G Y^T|^2 + |G G^+ X H^T - G Y^T H H^+|^2,

    an invariant metric that makes ``(G, H) -> G H^T`` a Riemannian submersion (derived here).

    The manifold is incomplete: a geodesic asked for beyond the time at which its rank drops raises
    ``ValueError``, and so do points without full rank.  Derivatives exist also where singular values coincide.

    >>> x = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    >>> FixedRank(2).proju(x, torch.eye(3, dtype=torch.float64)).diagonal().tolist()
    [1.0, 1.0, 0.0]
    """

    name = "FixedRank"
    ndim = 2

    def __init__(self, rank: int, rows: int | None = None):
        super().__init__()
        if rank < 1:
            raise ValueError(f"FixedRank: rank must be at least 1; got {rank}")
        if rows is not None and rows < rank:
            raise ValueError(f"FixedRank: rows must be at least the rank {rank}; got {rows}")
        self.rank, self.rows = rank, rows

    # ---- the two representations: decided here and nowhere else

    def frame(self, x: Tensor) -> EmbeddedFrame:
        """The point as a pair in the balanced gauge, in double precision; ``.deficient`` flags smaller ranks."""
        ok, reason = self._check_shape(x.shape, "x")
        if not ok:
            raise ValueError(f"FixedRank: {reason}")
        if x.is_complex():
            raise ValueError(f"FixedRank: points must be real; got {x.dtype}")
        precision = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps  # half precision is for storage
        threshold = max(1e-10, 30 * precision)
        return dense_frame(x, self.rank, threshold) if self.rows is None else stacked_frame(x, self.rows, threshold)

    def _regular(self, x: Tensor) -> EmbeddedFrame:
        f = self.frame(x)
        if bool(f.deficient.any()):
            raise ValueError(
                f"FixedRank: {int(f.deficient.sum())} of {f.deficient.numel()} points have a rank below {self.rank}: "
                "the manifold has no tangent space there; lower the rank"
            )
        return f

    def _enter(self, f: EmbeddedFrame, u: Tensor) -> Sides:
        """A vector as a pair in the balanced gauge (horizontal, if it is given as a matrix)."""
        u = widen(u)
        return f.lift(u @ f.h, u.mT @ f.g) if self.rows is None else f.enter(u)

    def _leave(self, f: EmbeddedFrame, sides: Sides) -> Tensor:
        return f.push(sides) if self.rows is None else f.leave(sides)

    def _place(self, f: EmbeddedFrame, pair: Sides) -> Tensor:
        return pair[0] @ pair[1].mT if self.rows is None else f.leave(pair)

    # ---- the manifold

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """``<u, v>`` at ``x``, shape ``(...)`` (``(..., 1, 1)`` with keepdim)."""
        v = u if v is None else v
        if self.rows is None:
            return (u * v).sum((-2, -1), keepdim=keepdim)
        f = self._regular(x)
        pairs = zip(self._enter(f, u), f.lower(self._enter(f, v)))
        total = torch.stack([(a * b).sum((-2, -1), keepdim=keepdim) for a, b in pairs]).sum(0)
        return total.to(x.dtype)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Onto the tangent space ``P_T(u)``; for pairs ``(X + G L, Y - H L^T)``, ``L = [(H^+ Y)^T - G^+ X] / 2``."""
        f = self._regular(x)
        return self._leave(f, f.project(self._enter(f, u))).to(x.dtype)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """``P_T`` of the Euclidean gradient; for pairs from the gradients of the two factors alone."""
        f = self._regular(x)
        sides = self._enter(f, u) if self.rows is None else f.project(f.raise_index(f.enter_covector(widen(u))))
        return self._leave(f, sides).to(x.dtype)

    def vertical(self, x: Tensor, algebra: Tensor) -> Tensor:
        """``(G L, -H L^T)`` for ``L (..., r, r)``; zero for matrices, whose group is trivial."""
        if self.rows is None:
            return torch.zeros_like(x)
        g, h = split(x, self.rows)
        return torch.cat([g @ algebra, -(h @ algebra.mT)], dim=-2)

    def christoffel(self, x: Tensor, u: Tensor) -> Tensor:
        """``Gamma(u, u)``: for matrices ``-2 U_p S^-1 V_p^T``, minus the second fundamental form.

        For horizontal ``[X; Y]``, with ``E = G^+ X`` and the normal parts ``X_n = X - G E``, ``Y_n = Y - H E^T``,
        it is ``2 X E - G E^2 - G W / 2``, ``2 Y E^T - H (E^T)^2 + H W^T / 2``,
        ``W = Y_n^T Y_n (H^T H)^-1 - (G^T G)^-1 X_n^T X_n``.
        """
        f = self._regular(x)
        sides = self._enter(f, u)
        if self.rows is None:
            left, right = f.normal(sides)
            return (-2 * (left @ right.mT)).to(x.dtype)
        a, b = f.acceleration(sides)
        return f.leave((-a, -b)).to(x.dtype)

    def geodesic(self, x: Tensor, u: Tensor, method: str = "exact") -> Curve:
        """``t -> c(t)``: "exact" (adaptive extrapolation), "taylor2" or "linear", which move the *pair* along a
        parabola or a line: the matrix has rank r in either representation.

        Raises ``ValueError`` from the curve when an exact geodesic loses rank before ``t``.
        """
        if method not in ("exact", "taylor2", "linear"):
            raise unknown_method(method)
        f = self._regular(x)
        x_g, y_h = sides = self._enter(f, u)
        bend = f.acceleration(sides) if method == "taylor2" else None

        def curve(t: float | Tensor) -> Tensor:
            if method == "exact":
                pair = f.curve(sides, t)
                _check_rank(pair, t)
            else:
                pair = f.g + t * x_g, f.h + t * y_h
            if bend is not None:
                pair = pair[0] + (0.5 * t * t) * bend[0], pair[1] + (0.5 * t * t) * bend[1]
            return self._place(f, pair).to(x.dtype)

        return curve

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """The truncated singular value decomposition of ``x + P_T(u)``, a retraction of second order.

        For pairs by QR of factors with 2r columns; the representative is the one that leaves ``x`` in the
        direction of the horizontal part of ``u``.
        """
        f = self._regular(x)
        a, b = f.project(self._enter(f, u))
        moved = svd_of_product(torch.cat([f.g + a, f.g], dim=-1), torch.cat([f.h.mT, b.mT], dim=-2))
        return self._place(f, f.represent(*truncate(moved, self.rank).factors())).to(x.dtype)

    def projx(self, x: Tensor) -> Tensor:
        """The closest matrix of rank r; for pairs, the representative ``[U S^(1/2); V S^(1/2)]`` of the same one."""
        nearest = truncate(self._decomposition(x), self.rank)
        b, a = nearest.factors()
        return (b @ a if self.rows is None else torch.cat([b, a.mT], dim=-2)).to(x.dtype)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """``P_T`` at ``y`` of the tangent *matrix* of ``v`` at ``x``: neither gauge of a pair matters to it."""
        at, to = self._regular(x), self._regular(y)
        a, b = self._enter(at, v)
        xi_h = a @ (at.h.mT @ to.h) + at.g @ (b.mT @ to.h)
        xi_g = at.h @ (a.mT @ to.g) + b @ (at.g.mT @ to.g)
        return self._leave(to, to.lift(xi_h, xi_g)).to(y.dtype)

    def try_logmap(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`logmap` with a mask ``(...)`` of the pairs of points for which it was found."""
        x, y = torch.broadcast_tensors(x, y)
        f = self.frame(x)
        found = log_embedded(f, self.frame(y))
        return self._leave(f, found.vector).to(x.dtype), found.converged

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The tangent vector whose geodesic ends at ``y``, by shooting; not recorded by autograd.

        Raises ``ValueError`` when no geodesic was found: the matrices are too far apart, compared to their
        smallest singular values.
        """
        vector, found = self.try_logmap(x, y)
        if not bool(found.all()):
            raise ValueError(
                f"FixedRank: no geodesic found for {int((~found).sum())} of {found.numel()} pairs of points: they are "
                "too far apart for their smallest singular values, or lack rank"
            )
        return vector

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The geodesic distance ``|logmap(x, y)|``, a constant for automatic differentiation."""
        return self.norm(x.detach(), self.logmap(x.detach(), y.detach()), keepdim=keepdim)

    def _decomposition(self, x: Tensor) -> LowRank:
        if self.rows is None:
            u, s, vh = torch.linalg.svd(widen(x), full_matrices=False)
            return LowRank(u, s, vh.mH)
        g, h = split(x, self.rows)
        return svd_of_product(g, h.mT)

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        if self.rows is None:
            fits, needed = len(shape) > 1 and min(shape[-2:]) >= self.rank, f"(..., m, n) with m, n >= {self.rank}"
        else:
            fits = len(shape) > 1 and shape[-2] >= self.rows + self.rank and shape[-1] == self.rank
            needed = f"(..., {self.rows} + n, {self.rank}) with n >= {self.rank}"
        return (True, None) if fits else (False, f"{name} needs the shape {needed}; got {tuple(shape)}")

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        finite, reason = super()._check_point_on_manifold(x, atol=atol, rtol=rtol)
        if not finite:
            return finite, reason
        s = self._decomposition(x).s
        if bool(self.frame(x).deficient.any()):
            return False, f"x {tuple(x.shape)} has a rank below {self.rank}"
        rest = s[..., self.rank :]
        if bool((rest > atol + rtol * s[..., :1]).any()):
            return False, f"x has a rank above {self.rank}: singular values up to {float(rest.max()):.1e} beyond it"
        return True, None


def _check_rank(pair: Sides, t: float | Tensor) -> None:
    lost = ~torch.isfinite(pair[0]).flatten(-2).all(-1)
    if bool(lost.any()):
        raise ValueError(
            f"FixedRank: the geodesic of {int(lost.sum())} of {lost.numel()} points loses rank before t = "
            f"{float(t):g}; take a smaller step, or the retraction"
        )
