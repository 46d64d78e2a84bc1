"""The kernels as their definitions read, in float64 whatever the input: the oracle of the other backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manifolds import linalg
from symgeo.kernels.inputs import (
    check_average,
    check_coefficients,
    check_coefficients_fit,
    check_finite,
    check_map,
    check_matrices,
    check_power,
    check_update,
    check_vectors,
    cutoff,
    is_packed,
    widest,
)
from symgeo.kernels.triangles import pack


def gram(x: Tensor, center: bool = False, packed: bool = False) -> Tensor:
    """``T_ij = sum_k x_ik x_jk``, ``(..., f, n) -> (..., f, f)``, of ``x - rowmean(x)`` if ``center``.

    Upper triangles ``(..., f (f + 1) / 2)`` if ``packed``.

    >>> gram(torch.tensor([[1.0, 3.0]]), center=True)
    tensor([[2.]])
    """
    check_matrices("x", x)
    wide = linalg.widen(x)
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    square = wide @ wide.mT
    result = (0.5 * (square + square.mT)).to(x.dtype)
    return pack(result) if packed else result


def power(t: Tensor, p: float, damping: float = 0.0) -> Tensor:
    """``V (s + damping max(s))^p V^T`` for ``t = V s V^T``, ``(..., n, n)``, positive semidefinite up to rounding.

    Negative ``s`` is rounding and counts as 0.  What is left at or below ``cutoff`` times ``max(s)`` after
    damping stays 0 under every power: a negative one is a pseudo-inverse, the power 0 the projector on the range.

    >>> power(torch.diag(torch.tensor([4.0, 0.0])), -0.5)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.0000]])
    """
    check_matrices("t", t, square=True)
    check_power(p, damping)
    check_finite("t", t)
    if t.numel() == 0:
        return t.clone()
    values, vectors = linalg.eigh(linalg.widen(t))
    values = values.clamp_min(0.0)
    top = values.amax(-1, keepdim=True)
    damped = values + damping * top
    kept = damped > cutoff(t.dtype, t.shape[-1]) * top
    powers = torch.where(kept, torch.where(kept, damped, 1.0) ** p, 0.0)
    result = (vectors * powers.unsqueeze(-2)) @ vectors.mT
    return (0.5 * (result + result.mT)).to(t.dtype)


def polar(x: Tensor) -> Tensor:
    """``U V^T`` for ``x = U s V^T``, ``(..., m, n)``: the partial isometry ``x (x^T x)^(-1/2)``.

    Singular values at or below ``cutoff`` times the largest count as zero and contribute nothing, so that the
    polar factor of a zero matrix is zero and that of a matrix of rank r has r singular values 1.

    >>> polar(torch.tensor([[0.0, -2.0], [3.0, 0.0]]))
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    check_matrices("x", x)
    check_finite("x", x)
    if x.numel() == 0:
        return x.clone()
    u, s, vh = torch.linalg.svd(linalg.widen(x), full_matrices=False)
    kept = s > cutoff(x.dtype, max(x.shape[-2:])) * s[..., :1]
    return ((u * kept.unsqueeze(-2)) @ vh).to(x.dtype)


def pair_sums(y: Tensor) -> Tensor:
    """The ten invariants of a matrix under permutations of its indices, ``(..., n, n) -> (..., 10)``.

    With ``r`` the row sums, ``c`` the column sums and ``d`` the diagonal:
    ``sum d, sum y, sum y_ij^2, sum y_ij y_ji, |d|^2, |r|^2, |c|^2, r.c, d.r, d.c``.

    >>> pair_sums(torch.tensor([[1.0, 2.0], [0.0, 3.0]])).tolist()
    [4.0, 6.0, 14.0, 10.0, 10.0, 18.0, 26.0, 18.0, 12.0, 16.0]
    """
    check_matrices("y", y, square=True)
    wide = linalg.widen(y)
    r, c, d = wide.sum(-1), wide.sum(-2), wide.diagonal(dim1=-2, dim2=-1)
    entries = (wide * wide).sum((-2, -1)), (wide * wide.mT).sum((-2, -1))
    products = [(u * v).sum(-1) for u, v in ((d, d), (r, r), (c, c), (r, c), (d, r), (d, c))]
    return torch.stack([d.sum(-1), wide.sum((-2, -1)), *entries, *products], dim=-1).to(y.dtype)


def affine(y: Tensor, a: float | Tensor, b: float | Tensor, c: float | Tensor, d: float | Tensor) -> Tensor:
    """``a y_ij + b mean_j(y_ij) + c mean_i(y_ij) + d mean(y)``, ``(..., m, n)``; coefficients one or ``(...)``.

    >>> affine(torch.tensor([[1.0, 3.0]]), 0, 1, 10, 100)
    tensor([[212., 232.]])
    """
    check_matrices("y", y)
    check_coefficients_fit(y, a=a, b=b, c=c, d=d)
    wide = linalg.widen(y)
    a, b, c, d = (torch.as_tensor(k, dtype=wide.dtype, device=y.device)[..., None, None] for k in (a, b, c, d))
    rows, columns, total = wide.mean(-1, keepdim=True), wide.mean(-2, keepdim=True), wide.mean((-2, -1), keepdim=True)
    return (a * wide + b * rows + c * columns + d * total).to(y.dtype)


def ema_gram(t: Tensor, x: Tensor, beta: float, scale: float = 1.0, center: bool = False) -> Tensor:
    """``t <- beta t + (1 - beta) scale x x^T`` in place, ``t`` whole or packed.

    >>> ema_gram(torch.eye(1), torch.tensor([[2.0]]), beta=0.5)
    tensor([[2.5000]])
    """
    check_average(t, x, beta)
    product = gram(linalg.widen(x), center, is_packed(t, x))
    return t.copy_(beta * linalg.widen(t) + (1.0 - beta) * scale * product)


def apply_update(w: Tensor, p: Tensor, x: Tensor, lr: float, decay: float = 0.0) -> Tensor:
    """``w <- (1 - lr decay) w - lr p x`` in place.

    >>> apply_update(torch.ones(1, 2), torch.tensor([[2.0]]), torch.tensor([[1.0, 3.0]]), lr=0.5)
    tensor([[ 0., -2.]])
    """
    check_update(w, p, x)
    return w.copy_((1.0 - lr * decay) * linalg.widen(w) - lr * linalg.widen(p) @ linalg.widen(x))


def inner_products(vectors: Sequence[Tensor]) -> Tensor:
    """``G_ij = sum_k u_ik u_jk``, ``(k, k)`` in float64.

    >>> inner_products([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]).tolist()
    [[5.0, 11.0], [11.0, 25.0]]
    """
    check_vectors(vectors)
    rows = [[(linalg.widen(u) * linalg.widen(v)).sum() for v in vectors] for u in vectors]
    return torch.stack([torch.stack(row) for row in rows])


def combination(vectors: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """``sum_i c_i u_i``.

    >>> combination([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], torch.tensor([2.0, -1.0]))
    tensor([-1.,  0.])
    """
    check_vectors(vectors)
    check_coefficients(vectors, coefficients)
    terms = [c * linalg.widen(u) for c, u in zip(linalg.widen(coefficients), vectors)]
    return torch.stack(terms).sum(0).to(widest(vectors))


def exponential_map(w: Tensor, z: Tensor, out: Tensor | None = None) -> Tensor:
    """``w exp(z)``.

    >>> exponential_map(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0]))
    tensor([ 1.0000, -5.4366])
    """
    check_map(w, z, out)
    result = (linalg.widen(w) * linalg.widen(z).exp()).to(w.dtype)
    return result if out is None else out.copy_(result)
