"""Kernels in three backends: the definition in float64, batched torch, and Triton where it can run.

===================  =========================================================  ==================================
name                 what                                                       shapes
===================  =========================================================  ==================================
``gram``             ``x x^T``, of rows less their means if asked               ``(..., f, n) -> (..., f, f)``
``power``            ``(t + damping max(s))^p`` on the range                    ``(..., n, n) -> (..., n, n)``
``polar``            ``x (x^T x)^(-1/2)``                                       ``(..., m, n) -> (..., m, n)``
``pair_sums``        ten sums invariant under permutations                      ``(..., n, n) -> (..., 10)``
``affine``           ``a y + b rowmean + c colmean + d mean``                   ``(..., m, n) -> (..., m, n)``
``ema_gram``         ``t <- beta t + (1 - beta) scale x x^T``                   ``t (..., f, f)``, ``x (..., f, n)``
``apply_update``     ``w <- (1 - lr decay) w - lr p x``                         ``w, x (..., f, n)``
``inner_products``   all pairs of up to four vectors, in float64                ``k`` times ``(n,) -> (k, k)``
``combination``      ``sum_i c_i u_i`` of up to four vectors                    ``k`` times ``(n,) -> (n,)``
``exponential_map``  ``w exp(z)``                                               any, the same for both
===================  =========================================================  ==================================

Any strides and leading batch dimensions, none and empty ones too; dtype and device are kept, inputs unchanged (but
for the two updates in place), half precision is summed in float32.  The functions here choose a backend by device,
size and dtype; ``backend=`` or :func:`get` choose it by name.

Triton takes over on a GPU, for tensors that no derivative and no transform of ``torch.func`` follows, where it saves
memory traffic or launches: always for ``pair_sums``, ``affine`` and the passes over vectors; for products (``gram``,
``ema_gram``, ``apply_update``) of half precision with 128 or more rows, and for ``gram`` of up to 32 centred rows; in
all of them but for float64.  Up to 64 x 64 for ``polar`` and the powers -1, -1/2, -1/4, 1/4, 1/2, of any type, unless
``method`` says otherwise.  These limits are not measured yet; ``benchmarks/kernels.py`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from symgeo.kernels.batched import NEWTON_POWERS, largest_eigenvalue, newton_serves
from symgeo.kernels.dispatch import available, choose, choose_method, get, names
from symgeo.kernels.inputs import (
    LARGEST_PROGRAM,
    check_average,
    check_coefficients,
    check_coefficients_fit,
    check_map,
    check_matrices,
    check_update,
    check_vectors,
    tracked,
)

#: rows from which on products of half precision go to Triton
TILED_ROWS = 128


def gram(x: Tensor, center: bool = False, packed: bool = False, *, backend: str | None = None) -> Tensor:
    """``x x^T`` of ``x (..., f, n)``, exactly symmetric; ``center`` subtracts each row's mean first, in two passes.

    ``packed`` gives the upper triangles, row by row, ``(..., f (f + 1) / 2)``.  Of large products little more than
    half is computed, on a CPU and where they are packed.

    >>> gram(torch.tensor([[1.0, 3.0], [0.0, 2.0]]), center=True)
    tensor([[2., 2.],
            [2., 2.]])
    """
    check_matrices("x", x)
    rows = x.shape[-2]
    if backend is None:
        backend = choose((center and rows <= 32) or _tiled(rows, x), x)
    return get("gram", backend)(x, center, packed)


def power(
    t: Tensor, p: float, damping: float = 0.0, *, least: float = 0.0, method: str | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """``V (s + damping max(s))^p V^T`` for symmetric positive semidefinite ``t = V s V^T (..., n, n)``.

    Eigenvalues that are zero to rounding after damping give zero under every power (a pseudo-inverse).  ``least``
    is a lower bound of the smallest eigenvalue as a fraction of the largest one, where one is known: products then
    look for no null space.

    ``method`` "eigh" takes any ``p``, reads the device, and raises ``ValueError`` for entries that are not finite;
    "newton" takes ``p`` in -1, -1/2, -1/4, 1/4, 1/2, is made of products only, never waits for the device, and gives
    no finite entries where there were others.  By default it is "eigh" on the CPU; elsewhere "newton" for those
    powers, but for float64 with ``damping`` and ``least`` below 1e-8, of which products resolve too little.

    >>> power(torch.diag(torch.tensor([4.0, 0.0])), -0.5)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.0000]])
    """
    check_matrices("t", t, square=True)
    if backend is None:
        small = t.shape[-1] <= LARGEST_PROGRAM and p in NEWTON_POWERS
        newton = method == "newton" or (method is None and newton_serves(t, p, damping, least))
        backend = choose(small and newton, t, double=True)
    extra: dict[str, Any] = choose_method("power", backend, method, library="eigh")
    if backend != "reference":
        extra["least"] = least
    return get("power", backend)(t, p, damping, **extra)


def polar(x: Tensor, *, method: str | None = None, backend: str | None = None) -> Tensor:
    """The polar factor ``U V^T`` of ``x = U s V^T (..., m, n)``, over the singular values that are not zero.

    It does not depend on the scale of ``x``, and is 0 for ``x = 0``.  ``method`` "svd", the default on the CPU,
    raises ``ValueError`` for entries that are not finite; "newton", the default elsewhere, is made of products only,
    never waits for the device, and gives no finite entries where there were others.

    >>> polar(torch.tensor([[3e-12], [4e-12]]))
    tensor([[0.6000],
            [0.8000]])
    """
    check_matrices("x", x)
    if backend is None:
        backend = choose(max(x.shape[-2:]) <= LARGEST_PROGRAM and method in (None, "newton"), x, double=True)
    return get("polar", backend)(x, **choose_method("polar", backend, method, library="svd"))


def pair_sums(y: Tensor, *, backend: str | None = None) -> Tensor:
    """Ten sums of ``y (..., n, n)`` that no permutation of its indices changes, ``(..., 10)``.

    With row sums ``r``, column sums ``c`` and diagonal ``d``:
    ``sum d, sum y, sum y_ij^2, sum y_ij y_ji, |d|^2, |r|^2, |c|^2, r.c, d.r, d.c``.

    >>> pair_sums(torch.eye(2)).tolist()
    [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """
    check_matrices("y", y, square=True)
    return get("pair_sums", choose(True, y) if backend is None else backend)(y)


def affine(
    y: Tensor, a: float | Tensor, b: float | Tensor, c: float | Tensor, d: float | Tensor, *, backend: str | None = None
) -> Tensor:
    """``a y_ij + b mean_j(y_ij) + c mean_i(y_ij) + d mean(y)`` of ``y (..., m, n)``.

    A coefficient is a number, or a tensor ``(...)`` with one for each matrix.  Raises ``ValueError`` for a tensor that
    does not broadcast to ``(...)``.

    >>> affine(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), 1, -1, -1, 1)
    tensor([[0., 0.],
            [0., 0.]])
    """
    check_matrices("y", y)
    check_coefficients_fit(y, a=a, b=b, c=c, d=d)
    if backend is None:
        backend = choose(not tracked(*(k for k in (a, b, c, d) if isinstance(k, Tensor))), y)
    return get("affine", backend)(y, a, b, c, d)


def ema_gram(
    t: Tensor, x: Tensor, beta: float, scale: float = 1.0, center: bool = False, *, backend: str | None = None
) -> Tensor:
    """``t <- beta t + (1 - beta) scale x x^T`` in place, ``t (..., f, f)``, ``x (..., f, n)``; returns ``t``.

    ``t`` is symmetric, of which its upper triangle may be taken for granted, and stays so to the last bit; or it is
    packed, ``(..., f (f + 1) / 2)``.  ``center`` subtracts the row means of ``x`` first.  Entries of ``t`` that are
    not finite stay so, for ``beta = 0`` too.  Raises ``ValueError`` when ``t`` is kept in half precision, in which an
    average of Gram matrices loses its definiteness, or does not fit ``x``, and for ``beta`` outside ``[0, 1]``.

    >>> t = torch.eye(2)
    >>> ema_gram(t, torch.tensor([[2.0], [4.0]]), beta=0.5)
    tensor([[2.5000, 4.0000],
            [4.0000, 8.5000]])
    """
    check_average(t, x, beta)
    if backend is None:
        backend = choose(_tiled(x.shape[-2], x), t, x)
    return get("ema_gram", backend)(t, x, beta, scale, center)


def apply_update(
    w: Tensor, p: Tensor, x: Tensor, lr: float, decay: float = 0.0, *, backend: str | None = None
) -> Tensor:
    """``w <- (1 - lr decay) w - lr p x`` in place, ``w, x (..., f, n)``, ``p (..., f, f)``; returns ``w``.

    The product is formed in float32 if ``w`` is of half precision.  Raises ``ValueError`` if shapes do not fit.

    >>> apply_update(torch.ones(1, 2), torch.tensor([[2.0]]), torch.tensor([[1.0, 3.0]]), lr=0.5)
    tensor([[ 0., -2.]])
    """
    check_update(w, p, x)
    if backend is None:
        backend = choose(_tiled(min(w.shape[-2:]), x) and p.dtype == x.dtype, w, p, x)
    return get("apply_update", backend)(w, p, x, lr, decay)


def inner_products(vectors: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """``G_ij = sum_k u_ik u_jk`` of one to four vectors ``(n,)``: a float64 tensor ``(k, k)`` on their device.

    One read; sums of blocks in the accumulation type are added in float64, in a fixed order.  Nothing waits for the
    device.  Raises ``ValueError`` for more vectors, and for lengths or devices that differ.

    >>> inner_products([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]).tolist()
    [[5.0, 11.0], [11.0, 25.0]]
    """
    check_vectors(vectors)
    return get("inner_products", choose(True, *vectors) if backend is None else backend)(vectors)


def combination(vectors: Sequence[Tensor], coefficients: Tensor, *, backend: str | None = None) -> Tensor:
    """``sum_i c_i u_i`` of one to four vectors ``(n,)``, with coefficients ``(k,)`` on their device.

    In the widest type of the vectors, summed in float32 at least.  Nothing waits for the device.  Raises
    ``ValueError`` as :func:`inner_products`, and for coefficients that do not fit the vectors.

    >>> combination([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], torch.tensor([2.0, -1.0]))
    tensor([-1.,  0.])
    """
    check_vectors(vectors)
    check_coefficients(vectors, coefficients)
    if backend is None:
        backend = choose(True, *vectors) if not tracked(coefficients) else "batched"
    return get("combination", backend)(vectors, coefficients)


def exponential_map(w: Tensor, z: Tensor, out: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``w exp(z)`` of tensors of one shape, in the type of ``w``: the geodesics of :class:`manifolds.Elementwise`.

    The result goes into ``out``, which may be ``w`` or ``z``, if given.  Raises ``ValueError`` for shapes or devices
    that differ.

    >>> exponential_map(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0]))
    tensor([ 1.0000, -5.4366])
    """
    check_map(w, z, out)
    if backend is None:
        backend = choose(True, w, z, *(() if out is None else (out,)))
    return get("exponential_map", backend)(w, z, out)


def _tiled(rows: int, x: Tensor) -> bool:
    """Whether a product is large and of half precision, which torch would widen in memory first."""
    return x.dtype in (torch.float16, torch.bfloat16) and rows >= TILED_ROWS


__all__ = [
    "affine",
    "apply_update",
    "available",
    "combination",
    "ema_gram",
    "exponential_map",
    "get",
    "gram",
    "inner_products",
    "largest_eigenvalue",
    "names",
    "pair_sums",
    "polar",
    "power",
]
