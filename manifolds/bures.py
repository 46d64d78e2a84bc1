"""Full-rank factors modulo rotations of their columns: Bures-Wasserstein geometry of ``x x^T``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manifolds.base import Curve, QuotientManifold, linear, unknown_method
from manifolds.linalg import divide, eigh, gram, polar, widen


class BuresWasserstein(QuotientManifold):
    """``R_*^{n x r} / O(r)`` with the Euclidean metric ``<u, v> = Tr u^T v`` on the factors.

    The orbit of ``x`` is the positive semidefinite matrix ``x x^T``, and the distance between orbits,
    ``min_Q |y Q - x|``, is the Bures-Wasserstein distance between such matrices (the geometry of Fréchet
    merging, arXiv 2604.27155; formulas derived here).

    Points are ``(..., n, r)`` with ``n >= r`` and full column rank.

    >>> m = BuresWasserstein(); x = torch.tensor([[2.0], [0.0]]); y = torch.tensor([[-3.0], [0.0]])
    >>> m.dist(x, y).item()
    1.0
    """

    name = "BuresWasserstein"
    ndim = 2

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """``Tr u^T v``."""
        return (u * (u if v is None else v)).sum((-2, -1), keepdim=keepdim)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """``u - x L`` with ``x^T x L + L x^T x = x^T u - u^T x``, which makes ``x^T (u - x L)`` symmetric."""
        cross = x.mT @ u
        return u - x @ _lyapunov(gram(x), cross - cross.mT)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """The gradient itself, made horizontal (it is, for a loss of ``x x^T``)."""
        return self.proju(x, u)

    def vertical(self, x: Tensor, algebra: Tensor) -> Tensor:
        """``x L``, the velocity of ``x exp(t L)``; ``L`` is the skew part of ``algebra`` ``(..., r, r)``."""
        return x @ (0.5 * (algebra - algebra.mT))

    def christoffel(self, x: Tensor, u: Tensor) -> Tensor:
        """Zero: the total space is flat."""
        return torch.zeros_like(x)

    def geodesic(self, x: Tensor, u: Tensor, method: str = "exact") -> Curve:
        """``x + t u``, whatever the method; shortest while ``x^T (x + t u)`` is positive semidefinite."""
        if method not in ("exact", "taylor2", "linear"):
            raise unknown_method(method)
        return linear(x, u)

    def align(self, x: Tensor, y: Tensor) -> Tensor:
        """The point ``y Q`` of the orbit of ``y`` closest to ``x``: ``Q`` is the polar factor of ``y^T x``.

        Where ``y^T x`` is singular several points are equally close and any one of them is returned.
        """
        return y @ _procrustes(y.mT @ x)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """``align(x, y) - x``, which is horizontal and has length ``dist(x, y)``."""
        return self.align(x, y) - x

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """``|align(x, y) - x| = (|x|^2 + |y|^2 - 2 |x^T y|_*)^{1/2}``, without the latter's cancellation."""
        return torch.linalg.vector_norm(self.logmap(x, y), dim=(-2, -1), keepdim=keepdim)

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        finite, reason = super()._check_point_on_manifold(x, atol=atol, rtol=rtol)
        if not finite:
            return finite, reason
        if bool((torch.linalg.matrix_rank(x) < x.shape[-1]).any()):
            return False, f"x {tuple(x.shape)} does not have full column rank {x.shape[-1]}"
        return True, None


def _lyapunov(a: Tensor, c: Tensor, refinements: int = 2) -> Tensor:
    """The solution of ``A X + X A = C`` for symmetric ``A >= 0``, with derivatives for repeated eigenvalues.

    The eigenvectors are constants to autograd; each refinement ``X += S(C - A X - X A)``, where ``S`` is the
    solution map of the constants, changes only the rounding error of the value and makes one more order of
    derivatives exact.
    """
    solve = _solver(widen(a).detach())
    wide_a, wide_c = widen(a), widen(c)
    x = solve(wide_c)
    for _ in range(refinements):
        x = x + solve(wide_c - wide_a @ x - x @ wide_a)
    return x.to(c.dtype)


def _procrustes(m: Tensor, refinements: int = 2) -> Tensor:
    """The orthogonal polar factor of ``m (..., r, r)``, with derivatives for repeated singular values.

    From a constant ``Q``, ``Q <- Q (I + W + W^2 / 2)`` with ``P W + W P = Q^T m - m^T Q``, ``P = Q^T m``; as
    in :func:`_lyapunov` each refinement makes one more order of derivatives exact (two at most).
    """
    wide = widen(m)
    q = polar(wide.detach())
    solve = _solver(q.mT @ wide.detach())
    for _ in range(refinements):
        cross = q.mT @ wide
        w = solve(cross - cross.mT)
        q = q + q @ (w + 0.5 * (w @ w))
    return q.to(m.dtype)


def _solver(a: Tensor) -> Callable[[Tensor], Tensor]:
    """``C -> X`` with ``A X + X A = C``, minimum norm where ``A`` is singular; one ``eigh`` for all calls."""
    values, vectors = eigh(a)
    total = values.unsqueeze(-1) + values.unsqueeze(-2)
    return lambda c: vectors @ divide(vectors.mT @ c @ vectors, total) @ vectors.mT
