"""Eigenvalues at the ends of a spectrum, from products."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manifolds.linalg import eigh
from symgeo.functional import Params
from symgeo.hessian.estimate import check_tol
from symgeo.hessian.lanczos import Recurrence
from symgeo.hessian.traces import sphere

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

ENDS = ("LA", "SA", "LM", "BE")
METHODS = ("krylov", "eigsh", "lobpcg")
#: up to this size a matrix is formed where the products of an iteration would outnumber its columns
EXACT = 4096
_BASIS = 2**26  # numbers that the basis of the block iteration may take, where that leaves it any
_ROUNDS = 1000


class _Pairs(NamedTuple):
    values: Tensor
    vectors: list[Params]


class Eigenpairs(_Pairs):
    """values : ``(k,)``, ascending;  vectors : one tangent vector for each, orthonormal in the metric.

    residuals : ``(k,)``, the norms ``|S v - lambda v|``: within so much of each value there is an eigenvalue
    """

    residuals: Tensor

    def __new__(cls, values: Tensor, vectors: list[Params], residuals: Tensor | None = None) -> Eigenpairs:
        self = super().__new__(cls, values, vectors)
        self.residuals = torch.full_like(values, torch.nan) if residuals is None else residuals
        return self


class _NotConverged(ValueError):
    """An iteration that has used up its products."""


def extreme(operator: Any, k: int | None, which: str = "LA", method: str = "krylov", tol: float | None = None,
            maxiter: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(k,)``, ascending, and orthonormal coordinates ``(d, k)`` of their eigenvectors."""
    size = operator.shape[0]
    if which not in ENDS:
        raise ValueError(f"which must be one of {', '.join(ENDS)}; got {which!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    count = size if k is None else _whole("k", k, f"between 1 and the dimension, {size}", size)
    if maxiter is not None:
        maxiter = _whole("maxiter", maxiter, "a positive integer")
    check_tol(tol)
    if k is None or size < 16 or 5 * count >= size:  # an iteration needs room to be worth it, or even to work
        return _dense(operator, count, which)
    eps = torch.finfo(operator.dtype).eps
    tol = max(1e-10, 10 * eps * size**0.5) if tol is None else tol
    solve = {"krylov": _krylov, "eigsh": _eigsh, "lobpcg": _lobpcg}[method]
    try:
        return solve(operator, count, which, tol, maxiter, seed)
    except _NotConverged:
        if maxiter is not None or size > EXACT:
            raise
        return _dense(operator, count, which)


def all_values(operator: Any) -> Tensor:
    """Every eigenvalue, ascending, from the matrix."""
    matrix = operator.dense()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{operator.name}: its entries are not finite")
    return torch.linalg.eigvalsh(matrix)


def _whole(name: str, value: Any, needed: str, most: float = math.inf) -> int:
    number = isinstance(value, (int, float, np.integer, np.floating))
    if not (number and value == value // 1 and 1 <= value <= most):
        raise ValueError(f"{name} must be {needed}; got {value!r}")
    return int(value)


def _dense(operator: Any, k: int, which: str) -> tuple[Tensor, Tensor]:
    values, vectors = eigh(operator.dense())
    chosen = _chosen(values, k, which)
    return values[chosen], vectors[:, chosen]


def _krylov(operator: Any, k: int, which: str, tol: float, maxiter: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Block Krylov subspaces with thick restarts: Rayleigh and Ritz, enlarged by the residuals of what is wanted.

    Two vectors more than are wanted are iterated, so that multiple eigenvalues come with their copies.  Done when the
    residuals are within ``tol`` of the largest magnitude seen, not of the eigenvalues, which may be 0; or within what
    the products lack of symmetry, where a model computes partly in lower precision.
    """
    size, wide = operator.shape[0], k + 2
    room = min(size, max(2 * wide + 8, min(max(100, 4 * wide), _BASIS // size)))
    start = torch.randn(size, wide, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fresh = torch.linalg.qr(start.to(operator.device, operator.dtype)).Q
    basis, images = fresh[:, :0], fresh[:, :0]
    used, scale, rounds = 0, 0.0, 0
    while True:
        basis, images = torch.cat([basis, fresh], 1), torch.cat([images, operator @ fresh], 1)
        used, rounds = used + fresh.shape[1], rounds + 1
        inner = basis.T @ images
        values, rotation = eigh(inner)
        noise = float((inner - inner.T).norm())
        scale = max(scale, float(values.abs().max()))
        wanted, near = _chosen(values, k, which), _chosen(values, min(wide, len(values)), which)
        residual = images @ rotation[:, near] - basis @ (rotation[:, near] * values[near])
        norms = residual.norm(dim=0)
        worst = float(norms[torch.isin(near, wanted)].max())
        if worst <= max(tol * scale, noise):
            return values[wanted], basis @ rotation[:, wanted]
        spent = rounds >= (maxiter or _ROUNDS) or (maxiter is None and size <= EXACT and used >= size)
        if spent or basis.shape[1] >= size:
            raise _NotConverged(f"krylov did not find {k} eigenvalues: after {used} products the residual is "
                                f"{worst / scale:.1e} of the largest; allow a larger tol or maxiter")
        if basis.shape[1] + wide > room:
            kept = rotation[:, _chosen(values, max(wide, room // 2), which)]
            basis, images = basis @ kept, images @ kept
        fresh = residual[:, norms > 0.1 * tol * scale][:, :size - basis.shape[1]]
        for _ in range(3):  # what rounding leaves of columns that add nothing is cleared by the last passes
            fresh = torch.linalg.qr(fresh - basis @ (basis.T @ fresh)).Q


def _magnitude(operator: Any, seed: int) -> float:
    """The largest magnitude of an eigenvalue, from a few steps of Lanczos: hardly below it, never above."""
    run = Recurrence(operator, sphere(operator, 2, torch.Generator().manual_seed(seed)))
    run.extend(12)
    return float(run.jacobi.gauss().nodes.abs().max())


def _eigsh(operator: Any, k: int, which: str, tol: float, maxiter: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """SciPy's ARPACK, shifted away from 0, to which its tolerance is relative, where there is one end."""
    from scipy.sparse.linalg import ArpackError, eigsh

    scale = _magnitude(operator, seed)
    if not scale:
        return _zeros(operator, k, seed)
    shift = {"LA": 2 * scale, "SA": -2 * scale}.get(which, 0.0)
    linear = to_scipy(operator, lambda image, x: image + shift * x)
    start = np.random.default_rng(seed).standard_normal(operator.shape[0]).astype(linear.dtype)
    rounds = maxiter or (operator.shape[0] // 10 if operator.shape[0] <= EXACT else None)
    try:
        found, columns = eigsh(linear, k=k, which=which, tol=tol / 3, maxiter=rounds, v0=start)
    except ArpackError as error:
        raise _NotConverged(f"eigsh did not find {k} eigenvalues ({str(error).splitlines()[0].strip()}); allow a "
                            "larger tol or maxiter, or ask for more of them") from error
    return _ascending(operator, found - shift, columns)


def _lobpcg(operator: Any, k: int, which: str, tol: float, maxiter: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """SciPy's LOBPCG on the operator over its magnitude, since its tolerance is absolute."""
    from scipy.sparse.linalg import lobpcg

    if which not in ("LA", "SA"):
        raise ValueError(f"method='lobpcg' finds the ends 'LA' and 'SA'; got {which!r}")
    scale = _magnitude(operator, seed)
    if not scale:
        return _zeros(operator, k, seed)
    linear, tol = to_scipy(operator, lambda image, x: image / scale), max(tol, 1e-8)
    start = np.random.default_rng(seed).standard_normal((operator.shape[0], k)).astype(linear.dtype)
    with warnings.catch_warnings():  # of what the residual below decides
        warnings.simplefilter("ignore", UserWarning)
        values, vectors = lobpcg(linear, start, largest=which == "LA", tol=tol, maxiter=maxiter or 500)
    residual = float(np.linalg.norm(linear @ vectors - vectors * values, axis=0).max())
    if not residual <= 3 * tol:
        raise _NotConverged(f"lobpcg did not find {k} eigenvalues: the residual is {residual:.1e} of the largest; "
                            "allow a larger tol or maxiter")
    return _ascending(operator, values * scale, vectors)


def _zeros(operator: Any, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of the zero operator any vectors are eigenvectors."""
    vectors = torch.linalg.qr(sphere(operator, k, torch.Generator().manual_seed(seed))).Q
    return vectors.new_zeros(k), vectors


def _ascending(operator: Any, values: np.ndarray, columns: np.ndarray) -> tuple[Tensor, Tensor]:
    order = np.argsort(values)
    kind = {"dtype": operator.dtype, "device": operator.device}
    return torch.as_tensor(values[order], **kind), torch.as_tensor(np.ascontiguousarray(columns[:, order]), **kind)


def _chosen(values: Tensor, k: int, which: str) -> Tensor:
    """Positions in ascending ``values``; "BE" takes one more from the high end, as SciPy does."""
    size = values.numel()
    if which == "LM":
        return values.abs().argsort(descending=True)[:k].sort().values
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    index = torch.arange(size, device=values.device)
    return torch.cat([index[:low], index[size - (k - low):]])


def to_scipy(operator: Any, change: Callable[[Tensor, Tensor], Tensor] = lambda image, x: image) -> LinearOperator:
    """The operator on NumPy arrays, in its own precision; change : of the image of a vector, given both."""
    from scipy.sparse.linalg import LinearOperator as Linear

    def product(x: np.ndarray) -> np.ndarray:
        columns = torch.tensor(np.asarray(x), dtype=operator.dtype, device=operator.device)
        shaped = columns.reshape(operator.shape[0], -1)
        return change(operator @ shaped, shaped).cpu().numpy().reshape(x.shape)

    dtype = torch.empty((), dtype=operator.dtype).numpy().dtype
    return Linear(operator.shape, matvec=product, matmat=product, rmatvec=product, rmatmat=product, dtype=dtype)
