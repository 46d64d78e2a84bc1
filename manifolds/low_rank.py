"""Matrices of low rank as thin factors, and the tangent spaces of the manifold that they form.

A matrix ``X (..., m, n)`` of rank r is never formed: it is a product ``B A`` of ``B (..., m, k)`` and
``A (..., k, n)``, or its thin singular value decomposition.  Everything takes leading batch dimensions, real or
complex entries, and is computed in double precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manifolds.linalg import widen

Factors = tuple[Tensor, Tensor]  # B (..., m, k) and A (..., k, n), which stand for the matrix B A


class LowRank(NamedTuple):
    """``X = U diag(s) V^H``: u ``(..., m, r)``, v ``(..., n, r)`` orthonormal, s ``(..., r)`` descending."""

    u: Tensor
    s: Tensor
    v: Tensor

    def factors(self) -> Factors:
        """The balanced factors ``B = U S^(1/2)``, ``A = S^(1/2) V^H``, whose Gram matrices are both ``S``."""
        root = self.s.sqrt().unsqueeze(-2)
        return self.u * root, (self.v * root).mH


def svd_of_product(b: Tensor, a: Tensor) -> LowRank:
    """The thin singular value decomposition of ``B A``, by QR of ``B`` and ``A^H`` and a small SVD.

    b, a : ``(..., m, k)``, ``(..., k, n)``, of any rank, zero included.  The result has rank ``min(k, m, n)``,
    with singular values 0 where the product has less.  Costs ``O((m + n) k^2)``.

    Raises ``ValueError`` for factors that do not fit or have entries that are not finite.

    >>> b, a = torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]])
    >>> svd_of_product(b, a).s
    tensor([10.], dtype=torch.float64)
    """
    b, a = _checked(b, a)
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.mH)
    u, s, vh = torch.linalg.svd(left.R @ right.R.mH, full_matrices=False)
    return LowRank(left.Q @ u, s, right.Q @ vh.mH)


def truncate(matrix: LowRank, rank: int) -> LowRank:
    """The closest matrix of that rank (Eckart-Young); one of smaller rank is returned as it is.

    Raises ``ValueError`` for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"truncate: rank must be at least 1; got {rank}")
    return LowRank(matrix.u[..., :rank], matrix.s[..., :rank], matrix.v[..., :rank])


def weighted_sum(products: Sequence[Factors], weights: Sequence[float | Tensor] | None = None) -> Factors:
    """``sum_i w_i B_i A_i`` as the one product ``[w_1 B_1, ...] [A_1; ...]``, exactly.

    products : pairs ``(..., m, k_i)``, ``(..., k_i, n)``;  weights : numbers of any sign, or tensors ``(...)``
    with one per batch element (default: all 1).

    Raises ``ValueError`` for no product and for a wrong number of weights.

    >>> one = torch.ones(1, 1)
    >>> b, a = weighted_sum([(one, one), (2 * one, one)], [1.0, -3.0]); (b @ a).item()
    -5.0
    """
    chosen: Sequence[float | Tensor] = [1.0] * len(products) if weights is None else weights
    if not products or len(chosen) != len(products):
        raise ValueError(f"weighted_sum needs one weight per product; got {len(products)} and {len(chosen)}")
    scaled = [b * (w[..., None, None] if isinstance(w, Tensor) else w) for (b, _), w in zip(products, chosen)]
    return torch.cat(scaled, dim=-1), torch.cat([a for _, a in products], dim=-2)


def inner(x: Factors, y: Factors) -> Tensor:
    """The Frobenius inner product ``Re Tr X^H Y = Re Tr (B_x^H B_y) (A_x A_y^H)^H``, shape ``(...)``."""
    (b_x, a_x), (b_y, a_y) = _checked(*x), _checked(*y)
    return ((b_x.mH @ b_y) * (a_x @ a_y.mH).conj()).real.sum((-2, -1))


def norm(x: Factors) -> Tensor:
    """The Frobenius norm ``|B A| = |R_B R_A^H|`` with the triangles of two QR, shape ``(...)``.

    The Gram matrices of :func:`inner` would lose half of the digits where the columns of ``B A`` cancel.
    """
    b, a = _checked(*x)
    return torch.linalg.matrix_norm(torch.linalg.qr(b).R @ torch.linalg.qr(a.mH).R.mH)


def distance(x: Factors, y: Factors) -> Tensor:
    """``|B_x A_x - B_y A_y|``, by QR of the concatenated factors: accurate to rounding of ``|X| + |Y|``.

    >>> one = torch.ones(2, 1)
    >>> distance((one, one.mT), (2 * one, 0.5 * one.mT)).item() < 1e-15
    True
    """
    return norm(weighted_sum([x, y], [1.0, -1.0]))


class Tangent(NamedTuple):
    """``U M V^H + U_p V^H + U V_p^H`` with ``U^H U_p = 0`` and ``V^H V_p = 0``: tangent to the matrices of rank r.

    m : ``(..., r, r)``;  up : ``(..., m, r)``;  vp : ``(..., n, r)``; at a point ``U S V^H``, which is not kept.
    The three parts are orthogonal, and orthonormal coordinates of the Frobenius metric.
    """

    m: Tensor
    up: Tensor
    vp: Tensor

    def norm(self) -> Tensor:
        """The Frobenius norm ``(|M|^2 + |U_p|^2 + |V_p|^2)^(1/2)``, shape ``(...)``."""
        return torch.stack([torch.linalg.matrix_norm(part) for part in self], dim=-1).norm(dim=-1)


def project(point: LowRank, b: Tensor, a: Tensor) -> Tangent:
    """The closest tangent vector to ``X = B A``: ``P_T(X) = U U^H X + X V V^H - U U^H X V V^H``."""
    b, a = _checked(b, a)
    left, right = point.u.mH @ b, a @ point.v  # U^H B, A V
    up = (b - point.u @ left) @ right
    vp = (a.mH - point.v @ right.mH) @ left.mH
    return Tangent(left @ right, up, vp)


def ambient(point: LowRank, tangent: Tangent) -> Factors:
    """The tangent vector as a matrix of rank 2r: ``[U M + U_p, U] [V^H; V_p^H]``."""
    b = torch.cat([point.u @ tangent.m + tangent.up, point.u], dim=-1)
    return b, torch.cat([point.v.mH, tangent.vp.mH], dim=-2)


def retract(point: LowRank, tangent: Tangent) -> LowRank:
    """The truncated singular value decomposition of ``X + xi``, a retraction of second order.

    ``X + xi = [U (S + M) + U_p, U] [V^H; V_p^H]`` needs QR of an ``m x 2r`` and an ``n x 2r`` matrix only.
    """
    moved = tangent._replace(m=tangent.m + torch.diag_embed(point.s).to(tangent.m.dtype))
    return truncate(svd_of_product(*ambient(point, moved)), point.s.shape[-1])


def _checked(b: Tensor, a: Tensor) -> Factors:
    if b.ndim < 2 or a.ndim < 2 or b.shape[-1] != a.shape[-2]:
        raise ValueError(f"a product needs b (..., m, k) and a (..., k, n); got {tuple(b.shape)} and {tuple(a.shape)}")
    for name, factor in (("b", b), ("a", a)):
        bad = int((~torch.isfinite(factor)).sum())
        if bad:
            raise ValueError(f"a product needs finite entries; {bad} of {factor.numel()} entries of {name} are not")
    return widen(b), widen(a)
