"""Kernels of matrices in plain torch: library calls on the CPU, matrix products only on accelerators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifolds import linalg
from symgeo.kernels import reference
from symgeo.kernels.batched.slabs import packed_product, whole_product
from symgeo.kernels.inputs import accumulation_type, check_coefficients_fit, check_matrices, check_power, cutoff
from symgeo.kernels.polynomials import Step, schedule

NEWTON_POWERS = (-1.0, -0.5, -0.25, 0.25, 0.5)  # those that products alone give
NEWTON_FLOOR = 1e-8  # the least relative eigenvalue that they resolve in float64
SQUARINGS = 16
BOUND_SQUARINGS = 5


def gram(x: Tensor, center: bool = False, packed: bool = False) -> Tensor:
    """``x x^T``, of the rows less their means if ``center``: ``(..., f, n) -> (..., f, f)``, exactly symmetric.

    The means are subtracted before anything is squared, so that rows with ``mean / std = 1e3`` lose no digits in
    float32.  Half precision is widened to float32; float32 follows ``torch.backends.cuda.matmul`` on TF32.  ``packed``
    gives upper triangles ``(..., f (f + 1) / 2)``.

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[5., 2.],
            [2., 1.]])
    """
    check_matrices("x", x)
    *batch, rows, _ = x.shape
    if x.numel() == 0:
        return x.new_zeros(*batch, rows * (rows + 1) // 2) if packed else x.new_zeros(*batch, rows, rows)
    wide = x.to(accumulation_type(x.dtype))
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    if packed:
        return packed_product(wide, wide).to(x.dtype)
    return whole_product(wide.reshape(-1, *x.shape[-2:])).reshape(*batch, rows, rows).to(x.dtype)


def symmetric(t: Tensor) -> Tensor:
    """``(t + t^T) / 2``: symmetric to the last bit, since the sum of two floats has no order."""
    return (t + t.mT).mul_(0.5)


def power(t: Tensor, p: float, damping: float = 0.0, method: str | None = None, least: float = 0.0) -> Tensor:
    """``(t + damping max(s) I)^p`` on the range of ``t (..., n, n)``, as :func:`symgeo.kernels.reference.power`.

    ``method`` "eigh" takes any ``p`` and reads the device once.  "newton" takes ``p`` in -1, -1/2, -1/4, 1/4, 1/2,
    is made of products only and never waits for the device; see :func:`_newton_power`.  Both compute in float64.
    By default it is "eigh" on the CPU, and elsewhere, where batched eigh is a sequential loop, "newton" where that
    serves: see :func:`newton_serves`.
    ``least`` is a lower bound of the smallest eigenvalue as a fraction of the largest one, where one is known: then
    "newton" looks for no null space, which is half of its work.

    >>> power(torch.diag(torch.tensor([4.0, 16.0])), -0.5, method="newton")
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    check_matrices("t", t, square=True)
    check_power(p, damping, least)
    if method is None:
        method = "newton" if t.device.type != "cpu" and newton_serves(t, p, damping, least) else "eigh"
    if method == "eigh":
        return reference.power(t, p, damping)
    if method != "newton":
        raise ValueError(f"method: needed 'eigh', 'newton' or None, found {method!r}")
    if p not in NEWTON_POWERS:
        raise ValueError(f"p: method 'newton' needs one of {NEWTON_POWERS}, found {p}; use method='eigh'")
    if t.numel() == 0:
        return t.clone()
    flat = linalg.widen(t).reshape(-1, *t.shape[-2:])
    result = _newton_power(flat, p, damping, max(cutoff(t.dtype, t.shape[-1]), NEWTON_FLOOR), least)
    return result.reshape(t.shape).to(t.dtype)


def newton_serves(t: Tensor, p: float, damping: float, least: float) -> bool:
    """Whether "newton" has ``p`` and resolves all that counts in ``t``: not in float64 without damping."""
    return p in NEWTON_POWERS and max(damping, least, cutoff(t.dtype, t.shape[-1])) >= NEWTON_FLOOR


def _newton_power(t: Tensor, p: float, damping: float, floor: float, least: float = 0.0) -> Tensor:
    """Power of ``t (B, n, n)`` by coupled iterations on ``a = t / s_max + damping I``, whose spectrum is known.

    The number of steps follows from ``max(damping, least, floor)`` alone.  Below ``floor`` the projector on the larger
    eigenvalues is ``P = (1 + sign(a - floor)) / 2``, and the root is taken of ``P a P + 1 - P``, which is well
    conditioned; eigenvalues within a factor of two of ``floor`` may be counted on either side.  Negative ones
    are damped as they are, not as zeros: a difference of rounding over damping.
    """
    t = symmetric(t)
    eye = torch.eye(t.shape[-1], dtype=t.dtype, device=t.device).expand_as(t)
    scale = t.abs().amax((-2, -1), keepdim=True)
    a = t / torch.where(scale > 0, scale, 1.0)
    top = largest_eigenvalue(a)
    a = a / torch.where(top > 0, top, 1.0) + damping * eye
    projector, least = None, max(damping, least)
    if least < floor:
        projector = 0.5 * (_compose(a - floor * eye, schedule(0.5 * floor)) + eye)
        a = projector @ a @ projector + eye - projector
    steps = schedule(math.sqrt(max(least, 0.5 * floor) / (1.0 + damping)))
    root, inverse = _roots(a / (1.0 + damping), steps)
    if abs(p) == 0.25:
        root, inverse = _roots(root, steps)
    result = inverse @ inverse if p == -1.0 else inverse if p < 0 else root
    if projector is not None:
        result = projector @ result @ projector
    size = torch.where(top > 0, (scale * top * (1.0 + damping)) ** p, 0.0)
    return symmetric(size * result)


def largest_eigenvalue(a: Tensor) -> Tensor:
    """The largest eigenvalue of positive semidefinite ``a (B, n, n)``, as ``tr(a b) / tr(b)`` with ``b ~ a^(2^k)``.

    Low by at most the fraction ``ln(n) / 2^k``, k = 16, whatever the gaps (derived here: with weights
    ``exp(-x_i)``, one ``x_i`` 0, the mean of ``x`` is entropy less ``ln Z <= ln n``).  Shape ``(B, 1, 1)``.

    >>> round(largest_eigenvalue(torch.diag(torch.tensor([1.0, 3.0]))[None]).item(), 5)
    3.0
    """
    b = a
    for _ in range(SQUARINGS):
        norm = torch.linalg.matrix_norm(b, keepdim=True)
        b = b / torch.where(norm > 0, norm, 1.0)
        b = b @ b
    trace = b.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return (a * b).sum((-2, -1), keepdim=True) / torch.where(trace > 0, trace, 1.0)


def _roots(a: Tensor, steps: tuple[Step, ...]) -> tuple[Tensor, Tensor]:
    """``a^(1/2)`` and ``a^(-1/2)`` by the coupled iteration ``y <- y h(z y)``, ``z <- h(z y) z``."""
    y, z = a, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    for step in steps:
        h = _even(z @ y, step)
        y, z = y @ h, h @ z
    return y, z


def _even(w: Tensor, step: Step) -> Tensor:
    """``a + b w + c w^2`` of square matrices."""
    a, b, c = step
    h = torch.baddbmm(w, w, w, beta=b, alpha=c)
    h.diagonal(dim1=-2, dim2=-1).add_(a)
    return h


def _compose(x: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """Every step ``x <- x (a + b x^T x + c (x^T x)^2)`` in turn, ``(B, m, n)``; cheapest for ``m >= n``."""
    for step in steps:
        x = x @ _even(x.mT @ x, step)
    return x


def polar(x: Tensor, method: str | None = None) -> Tensor:
    """The polar factor ``x (x^T x)^(-1/2)`` of ``x (..., m, n)``, as :func:`symgeo.kernels.reference.polar`.

    ``method`` "svd" (the default on the CPU) works in float64.  "newton" (the default elsewhere) is made of
    products in the accumulation type: the result is orthogonal to a few eps, and as near the polar factor as an
    SVD in that type, about ``eps s_max / s_min``.  Neither depends on the scale of ``x``, which is divided by its
    largest entry and by a bound of ``s_max``, without an absolute epsilon.  "newton" leaves out what
    is below a fifth of ``max(cutoff, 100 eps) s_max`` and keeps all from two thirds of it on.

    >>> polar(torch.tensor([[0.0, -2e-12], [3e-12, 0.0]]), method="newton").round(decimals=5) + 0.0
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    check_matrices("x", x)
    if method is None:
        method = "svd" if x.device.type == "cpu" else "newton"
    if method == "svd":
        return reference.polar(x)
    if method != "newton":
        raise ValueError(f"method: needed 'svd', 'newton' or None, found {method!r}")
    if x.numel() == 0:
        return x.clone()
    rows, columns = x.shape[-2:]
    flat = x.to(accumulation_type(x.dtype)).reshape(-1, rows, columns)
    tall = flat if rows >= columns else flat.mT
    scale = tall.abs().amax((-2, -1), keepdim=True)
    tall = tall / torch.where(scale > 0, scale, 1.0)
    tall = tall / largest_singular_bound(tall)
    result = _compose(tall, schedule(polar_floor(x.dtype, flat.dtype, max(rows, columns)), cut=True))
    return (result if rows >= columns else result.mT).reshape(x.shape).to(x.dtype)


def polar_floor(given: torch.dtype, arithmetic: torch.dtype, size: int) -> float:
    """The least singular value, as a fraction of the largest, that products in ``arithmetic`` resolve."""
    return max(cutoff(given, size), 100 * torch.finfo(arithmetic).eps)


def largest_singular_bound(x: Tensor) -> Tensor:
    """``|(x^T x)^(2^k)|_F^(1 / 2^(k+1))`` of ``x (B, m, n)``: between ``s_max`` and ``n^(1 / 2^(k+2)) s_max``.

    With k = 5 at most 7 % too large for n = 4096; 1 for a zero matrix.  Shape ``(B, 1, 1)``.

    >>> bool(1.0 <= largest_singular_bound(torch.eye(5)[None]) < 1.013)
    True
    """
    power = x.mT @ x
    logarithm, weight = torch.zeros_like(power[..., :1, :1]), 0.5
    for k in range(BOUND_SQUARINGS + 1):
        power = power @ power if k else power
        norm = torch.linalg.matrix_norm(power, keepdim=True)
        norm = torch.where(norm > 0, norm, 1.0)
        power, logarithm, weight = power / norm, logarithm + weight * norm.log(), 0.5 * weight
    return logarithm.exp()


def pair_sums(y: Tensor) -> Tensor:
    """Ten sums ``(..., n, n) -> (..., 10)``, in the order of :func:`symgeo.kernels.reference.pair_sums`.

    float16 sums overflow above 65504, as everywhere in that type.

    >>> pair_sums(torch.ones(2, 2)).tolist()
    [2.0, 4.0, 4.0, 4.0, 2.0, 8.0, 8.0, 8.0, 4.0, 4.0]
    """
    check_matrices("y", y, square=True)
    wide = y.to(accumulation_type(y.dtype))
    squares, crossed = (wide * wide).sum((-2, -1)), (wide * wide.mT).sum((-2, -1))
    sums = finish_pair_sums(wide.sum(-1), wide.sum(-2), wide.diagonal(dim1=-2, dim2=-1), squares, crossed)
    return sums.to(y.dtype)


def finish_pair_sums(r: Tensor, c: Tensor, d: Tensor, squares: Tensor, crossed: Tensor) -> Tensor:
    """The ten sums from row sums, column sums and diagonal ``(..., n)`` and the two sums over entries ``(...)``."""
    products = (torch.stack([d, r, c, r, d, d], dim=-2) * torch.stack([d, r, c, c, r, c], dim=-2)).sum(-1)
    return torch.cat([torch.stack([d.sum(-1), r.sum(-1), squares, crossed], dim=-1), products], dim=-1)


def affine(y: Tensor, a: float | Tensor, b: float | Tensor, c: float | Tensor, d: float | Tensor) -> Tensor:
    """``a y + b rowmean + c colmean + d mean`` of ``(..., m, n)``; coefficients are numbers or tensors ``(...)``.

    >>> affine(torch.tensor([[1.0, 3.0]]), 1, -1, 0, 0)
    tensor([[-1.,  1.]])
    """
    check_matrices("y", y)
    check_coefficients_fit(y, a=a, b=b, c=c, d=d)
    wide = y.to(accumulation_type(y.dtype))
    a, b, c, d = (_coefficient(k, wide) for k in (a, b, c, d))
    rows, columns = wide.mean(-1, keepdim=True), wide.mean(-2, keepdim=True)
    return (a * wide + (b * rows + d * rows.mean(-2, keepdim=True)) + c * columns).to(y.dtype)


def _coefficient(value: float | Tensor, y: Tensor) -> float | Tensor:
    """A number as it is, a tensor ``(...)`` so that it multiplies the matrices of its place."""
    return value.to(y)[..., None, None] if isinstance(value, Tensor) else value
