"""Eigenvalues at the ends of a spectrum, by SciPy's solvers on products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manifolds.linalg import eigh
from symgeo.functional import Params

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

ENDS = ("LA", "SA", "LM", "BE")
METHODS = ("eigsh", "lobpcg")


class Eigenpairs(NamedTuple):
    """values : ``(k,)``, ascending;  vectors : one tangent vector for each, orthonormal in the metric."""

    values: Tensor
    vectors: list[Params]


def extreme(operator: Any, k: int | None, which: str = "LA", method: str = "eigsh", tol: float | None = None,
            maxiter: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(k,)``, ascending, and orthonormal coordinates ``(d, k)`` of their eigenvectors."""
    size = operator.shape[0]
    if which not in ENDS:
        raise ValueError(f"which must be one of {', '.join(ENDS)}; got {which!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if k is not None and (int(k) != k or not 1 <= k <= size):
        raise ValueError(f"k must be between 1 and the dimension, {size}; got {k}")
    if k is None or size < 16 or 5 * k >= size:  # the iterative solvers need room to be worth it, or even to work
        values, vectors = eigh(operator.dense())
        chosen = _chosen(values, size if k is None else k, which)
        return values[chosen], vectors[:, chosen]
    precision = torch.finfo(operator.dtype).eps
    tol = (1e-10 if precision < 1e-10 else 10 * precision) if tol is None else tol
    found, columns = _solve(operator, k, which, method, tol, maxiter, seed)
    order = np.argsort(found)
    kind = {"dtype": operator.dtype, "device": operator.device}
    return torch.as_tensor(found[order], **kind), torch.as_tensor(np.ascontiguousarray(columns[:, order]), **kind)


def _solve(operator: Any, k: int, which: str, method: str, tol: float, maxiter: int | None,
           seed: int) -> tuple[np.ndarray, np.ndarray]:
    from scipy.sparse.linalg import ArpackError, eigsh, lobpcg

    draw, linear = np.random.default_rng(seed), to_scipy(operator)
    if method == "eigsh":
        start = draw.standard_normal(operator.shape[0]).astype(linear.dtype)
        try:
            return eigsh(linear, k=k, which=which, tol=tol, maxiter=maxiter, v0=start)
        except ArpackError as error:
            raise ValueError(f"eigsh did not find {k} eigenvalues ({str(error).splitlines()[0].strip()}); allow a "
                             "larger tol or maxiter, or ask for more of them") from error
    if which not in ("LA", "SA"):
        raise ValueError(f"method='lobpcg' finds the ends 'LA' and 'SA'; got {which!r}")
    start = draw.standard_normal((operator.shape[0], k)).astype(linear.dtype)
    tol = max(tol, 1e-8)
    values, vectors = lobpcg(linear, start, largest=which == "LA", tol=tol, maxiter=maxiter or 500)
    residual = float(np.linalg.norm(linear @ vectors - vectors * values, axis=0).max())
    if residual > 100 * tol * max(1.0, float(np.abs(values).max())):
        raise ValueError(f"lobpcg did not find {k} eigenvalues: residual {residual:.1e}; allow a larger tol or maxiter")
    return values, vectors


def _chosen(values: Tensor, k: int, which: str) -> Tensor:
    """Positions in ascending ``values``; "BE" takes one more from the high end, as SciPy does."""
    size = values.numel()
    if which == "LM":
        return values.abs().argsort(descending=True)[:k].sort().values
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    index = torch.arange(size, device=values.device)
    return torch.cat([index[:low], index[size - (k - low):]])


def to_scipy(operator: Any) -> LinearOperator:
    """The operator on NumPy arrays, in its own precision."""
    from scipy.sparse.linalg import LinearOperator as Linear

    def product(x: np.ndarray) -> np.ndarray:
        columns = torch.tensor(np.asarray(x), dtype=operator.dtype, device=operator.device)
        shaped = columns.reshape(operator.shape[0], -1)
        return (operator @ shaped).cpu().numpy().reshape(x.shape)

    dtype = torch.empty((), dtype=operator.dtype).numpy().dtype
    return Linear(operator.shape, matvec=product, matmat=product, rmatvec=product, rmatmat=product, dtype=dtype)
