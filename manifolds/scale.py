"""Vectors modulo positive scaling: the geometry of a scale-invariant block of weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from manifolds.base import Curve, QuotientManifold, linear, taylor2, unknown_method


class ScaleQuotient(QuotientManifold):
    """``(R^n without 0) / (x ~ a x, a > 0)`` with the metric ``<u, v>_x = u . v / |x|^2`` (derived here).

    In polar coordinates the metric is ``(d log |x|)^2 + dOmega^2``, a cylinder over the unit sphere, and the
    quotient is that sphere: vertical directions are multiples of ``x``, horizontal ones are orthogonal to it.

    Points are ``(..., n)``.  A vector that is exactly zero is left out: it adds nothing to ``inner``, its
    tangent vectors are 0, and the exponential map keeps it 0.

    >>> m = ScaleQuotient(); x = torch.tensor([3.0, 0.0]); y = torch.tensor([0.0, 0.5])
    >>> round(m.dist(x, y).item(), 6), m.proju(x, torch.tensor([1.0, 1.0])).tolist()
    (1.570796, [0.0, 1.0])
    """

    name = "ScaleQuotient"
    ndim = 1

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """``u . v / |x|^2``."""
        a = _over_norm(u, x)
        return (a * (a if v is None else _over_norm(v, x))).sum(-1, keepdim=keepdim)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The part of ``u`` orthogonal to ``x`` (0 where ``x`` is the zero vector)."""
        return torch.where(_is_zero(x), torch.zeros_like(u), u - _radial(x, u) * x)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """The Riemannian gradient ``|x|^2 g``, made horizontal (it is, for a scale-invariant loss)."""
        return _square(x) * self.proju(x, u)

    def vertical(self, x: Tensor, algebra: Tensor) -> Tensor:
        """``L x``, the velocity of ``exp(t L) x``; ``algebra`` is ``(..., 1)`` or ``(...)``."""
        return x * (algebra if algebra.ndim == x.ndim else algebra.unsqueeze(-1))

    def christoffel(self, x: Tensor, u: Tensor) -> Tensor:
        """``Gamma(u, u) = (|u|^2 x - 2 (x . u) u) / |x|^2``."""
        return self.inner(x, u, keepdim=True) * x - 2 * _radial(x, u) * u

    def geodesic(self, x: Tensor, u: Tensor, method: str = "exact") -> Curve:
        """``exp(t a) (x cos(t theta) + h sin(t theta) / theta)``; also "taylor2" and "linear".

        ``a = x . u / |x|^2`` is the vertical part, ``h = u - a x`` the horizontal one, ``theta = |h| / |x|``.
        Differentiable to every order, also at ``u = 0``.
        """
        if method not in ("exact", "taylor2", "linear"):
            raise unknown_method(method)
        u = torch.where(_is_zero(x), torch.zeros_like(u), u)
        if method == "taylor2":
            return taylor2(x, u, self.christoffel(x, u))
        if method == "linear":
            return linear(x, u)
        radial, h = _radial(x, u), self.proju(x, u)
        square = self.inner(x, h, keepdim=True)

        def curve(t: float | Tensor) -> Tensor:
            s = t * t * square
            return torch.exp(t * radial) * (x * _cos_root(s) + (t * h) * _sinc_root(s))

        return curve

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The horizontal ``u`` at ``x`` whose geodesic reaches the ray of ``y``: ``|u| / |x|`` is the angle.

        Raises ``ValueError`` for opposite vectors (every great circle joins them) and for zero or non-finite
        vectors.  Smooth in both points, also at ``y = x``.
        """
        e, f = _unit(x, "x"), _unit(y, "y")
        cosine = (e * f).sum(-1, keepdim=True)
        rest = f - cosine * e
        rest = rest - (e * rest).sum(-1, keepdim=True) * e
        square = _square(rest)
        opposite = (cosine < 0) & (square <= torch.finfo(x.dtype).eps ** 2)
        if bool(opposite.any()):
            raise ValueError(
                f"x and y are opposite in {int(opposite.sum())} of {opposite.numel()} vectors: "
                "infinitely many shortest geodesics of ScaleQuotient join them"
            )
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True) * rest * _angle_over_sine(square, cosine)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The angle ``2 atan2(|e - f|, |e + f|)`` between the unit vectors ``e`` of ``x`` and ``f`` of ``y``.

        Raises ``ValueError`` for zero or non-finite vectors.
        """
        e, f = _unit(x, "x"), _unit(y, "y")
        chord = torch.linalg.vector_norm(e - f, dim=-1, keepdim=keepdim)
        return 2 * torch.atan2(chord, torch.linalg.vector_norm(e + f, dim=-1, keepdim=keepdim))

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Parallel transport along the shortest geodesic, an isometry onto the tangent space at ``y``.

        With ``a = x . v / |x|^2``, ``h = v - a x`` and the unit vectors ``e`` of ``x`` and ``f`` of ``y`` it
        is ``a y + |y| / |x| (h - (f . h) (e + f) / (1 + e . f))``.  Between opposite vectors, where the
        geodesic is not unique, it goes along one orthogonal to ``h``.
        """
        e, f = _over_norm(x, x), _over_norm(y, y)
        h = _over_norm(self.proju(x, v), x)
        one_plus = 0.5 * _square(e + f)
        flat = one_plus <= torch.finfo(x.dtype).eps ** 2
        turn = (f * h).sum(-1, keepdim=True) / torch.where(flat, torch.ones_like(one_plus), one_plus)
        moved = h - torch.where(flat, torch.zeros_like(turn), turn) * (e + f)
        return _radial(x, v) * y + torch.linalg.vector_norm(y, dim=-1, keepdim=True) * moved

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if bool(_is_zero(x).any()):
            return False, "x has vectors that are zero"
        return super()._check_point_on_manifold(x, atol=atol, rtol=rtol)


def _is_zero(x: Tensor) -> Tensor:
    return (x == 0).all(-1, keepdim=True)


def _square(x: Tensor) -> Tensor:
    return (x * x).sum(-1, keepdim=True)


def _over_norm(u: Tensor, x: Tensor) -> Tensor:
    """``u / |x|``, and 0 where ``x`` is the zero vector."""
    zero = _is_zero(x)
    norm = torch.linalg.vector_norm(torch.where(zero, torch.ones_like(x), x), dim=-1, keepdim=True)
    return torch.where(zero, torch.zeros_like(u), u / norm)


def _radial(x: Tensor, u: Tensor) -> Tensor:
    """``x . u / |x|^2``."""
    return (_over_norm(x, x) * _over_norm(u, x)).sum(-1, keepdim=True)


def _unit(x: Tensor, name: str) -> Tensor:
    e = _over_norm(x, x)
    bad = _is_zero(x) | ~torch.isfinite(e).all(-1, keepdim=True)
    if bool(bad.any()):
        raise ValueError(f"{name} needs finite nonzero vectors; {int(bad.sum())} of {bad.numel()} are not")
    return e


def _near_zero(
    s: Tensor, bound: float, series: Callable[[Tensor], Tensor], closed: Callable[[Tensor], Tensor]
) -> Tensor:
    """``series(s)`` for ``s < bound`` and ``closed(s)`` elsewhere; neither spoils the other's derivative."""
    small = s < bound
    near = series(torch.where(small, s, torch.zeros_like(s)))
    return torch.where(small, near, closed(torch.where(small, torch.full_like(s, bound), s)))


def _polynomial(s: Tensor, coefficients: list[float]) -> Tensor:
    total = torch.full_like(s, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = coefficient + s * total
    return total


_COS = [(-1) ** k / math.factorial(2 * k) for k in range(10)]
_SINC = [(-1) ** k / math.factorial(2 * k + 1) for k in range(10)]
_ATAN = [(-1) ** k / (2 * k + 1) for k in range(10)]


def _cos_root(s: Tensor) -> Tensor:
    """``cos(sqrt(s))``, an entire function of ``s``."""
    return _near_zero(s, 0.1, lambda s: _polynomial(s, _COS), lambda s: torch.cos(torch.sqrt(s)))


def _sinc_root(s: Tensor) -> Tensor:
    """``sin(sqrt(s)) / sqrt(s)``, an entire function of ``s``."""
    return _near_zero(
        s, 0.1, lambda s: _polynomial(s, _SINC), lambda s: torch.sin(torch.sqrt(s)) / torch.sqrt(s)
    )


def _angle_over_sine(square: Tensor, cosine: Tensor) -> Tensor:
    """``theta / sin(theta)`` from ``sin^2`` and ``cos``, smooth at ``theta = 0``."""
    near = (cosine > 0) & (square < 0.01)
    c = torch.where(near, cosine, torch.ones_like(cosine))
    q = torch.where(near, square, torch.zeros_like(square)) / (c * c)
    root = torch.sqrt(torch.where(near, torch.ones_like(square), square))
    far = torch.atan2(root, cosine) / root
    return torch.where(near, _polynomial(q, _ATAN) / c, far)
