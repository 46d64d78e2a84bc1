"""The linear operator that every curvature matrix here is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from symgeo.functional import Params
from symgeo.hessian import quadrature, spectrum, traces
from symgeo.hessian.derivatives import asymmetry, not_symmetric, probes
from symgeo.hessian.estimate import Estimate, TensorEstimate
from symgeo.hessian.lanczos import SpectralDensity
from symgeo.hessian.space import FlatSpace, Space
from symgeo.hessian.spectrum import EXACT

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Product = Callable[[Tensor], Tensor]

#: numbers that are differentiated at once, columns times parameters, unless ``chunk`` says otherwise
_AT_ONCE = 2**22


def log_plan(samples: int | None, steps: int | None, tol: float | None, seed: int) -> quadrature.Plan:
    """What is drawn for a log-determinant."""
    default = 16 if tol is None else 256
    return quadrature.Plan(default if samples is None else samples, steps, tol, seed)


def _check_real(name: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.is_complex():
            raise ValueError(f"{name} @ needs real tensors; got {tensor.dtype}: multiply its parts apart")


def _regular(values: Tensor) -> bool:
    """Whether magnitudes of eigenvalues are all above what rounding makes of zero."""
    return not values.numel() or bool(values.min() > values.numel() * torch.finfo(values.dtype).eps * values.max())


class HessianOperator:
    """A symmetric linear map of the tangent space at a point, known by its products.

    ``operator @ z`` takes coordinates: a flat tensor ``(d,)`` or columns ``(d, k)``.  ``operator @ u`` takes a tangent
    vector as ``Params`` and returns one.  For matrices in parameter coordinates the two are the same numbers in flat
    order; for Riemannian ones the coordinates belong to a metric-orthonormal frame, in which the map is symmetric,
    and ``operator @ u`` is the map ``u -> nabla_u grad L`` whatever the frame.

    Operators of one space can be added, and multiplied by numbers.

    shape : ``(d, d)``;  space : what coordinates mean;  name : what it is;  chunk : columns differentiated at once
    """

    def __init__(self, product: Product, space: Space, name: str = "operator", chunk: int | None = None):
        if chunk is not None and (int(chunk) != chunk or chunk < 1):
            raise ValueError(f"chunk must be a positive integer; got {chunk}")
        self.product, self.space, self.name = product, space, name
        self.chunk = chunk or max(1, min(64, _AT_ONCE // max(space.size, 1)))

    @property
    def shape(self) -> tuple[int, int]:
        """``(d, d)``."""
        return self.space.size, self.space.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of coordinates."""
        return self.space.dtype

    @property
    def device(self) -> torch.device:
        """The device of coordinates."""
        return self.space.device

    def __repr__(self) -> str:
        return f"HessianOperator({self.name}, {self.shape[0]} x {self.shape[0]}, {self.dtype})"

    def verified(self, check: bool = True, scale: float = 0.0) -> HessianOperator:
        """This operator, after one pair of products has shown it to be finite and symmetric (``ValueError`` if not).

        scale : the size of the gradient, against which entries count as rounding
        """
        if check and self.shape[0]:
            v = probes(torch.empty(self.shape[0], dtype=self.dtype, device=self.device))
            gap = asymmetry(v, self @ v, scale)
            if gap:
                raise not_symmetric(self.name, gap)
        return self

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: Mapping[str, Tensor]) -> Params: ...

    def __matmul__(self, other: Tensor | Mapping[str, Tensor]) -> Tensor | Params:
        if isinstance(other, Mapping):
            _check_real(self.name, *other.values())
            return self.space.tangent(self._columns(self.space.coordinates(other).unsqueeze(1)).squeeze(1))
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim not in (1, 2) or other.shape[0] != self.shape[0]:
            size = self.shape[0]
            raise ValueError(f"{self.name} @ needs a tensor ({size},) or ({size}, k), or Params; "
                             f"got {tuple(other.shape)}")
        _check_real(self.name, other)
        moved = other.detach().to(self.device, self.dtype)
        return self._columns(moved.unsqueeze(1)).squeeze(1) if other.ndim == 1 else self._columns(moved)

    def _columns(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            if v.shape[1] <= self.chunk:
                return self.product(v) if v.shape[1] else v.clone()
            return torch.cat([self.product(piece) for piece in v.split(self.chunk, dim=1)], dim=1)

    def __add__(self, other: HessianOperator) -> HessianOperator:
        if not isinstance(other, HessianOperator):
            return NotImplemented
        if not self.space.same(other.space):
            raise ValueError(f"cannot add {self!r} and {other!r}: they act on different spaces")
        return self._with(lambda v: self.product(v) + other.product(v), f"{self.name} + {other.name}")

    def __mul__(self, factor: float) -> HessianOperator:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return self._with(lambda v: self.product(v) * float(factor), f"{factor} {self.name}")

    __rmul__ = __mul__

    def __neg__(self) -> HessianOperator:
        return -1.0 * self

    def __sub__(self, other: HessianOperator) -> HessianOperator:
        return self + (-other)

    def __truediv__(self, divisor: float) -> HessianOperator:
        return self * (1.0 / divisor)

    def _with(self, product: Product, name: str) -> HessianOperator:
        return HessianOperator(product, self.space, name, self.chunk)

    def dense(self) -> Tensor:
        """The matrix ``(d, d)``, exactly symmetric; d products."""
        columns = self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return 0.5 * (columns + columns.T)

    def eigvalsh(self, k: int | None = None, which: str = "LA", **options: Any) -> Tensor:
        """The eigenvalues, ascending: all of them, or ``k`` at one end; see :meth:`eigh`."""
        if k is None and not options:
            return spectrum.all_values(self)
        return spectrum.extreme(self, k, which, **options)[0]

    def eigh(self, k: int | None = None, which: str = "LA", **options: Any) -> spectrum.Eigenpairs:
        """Eigenvalues, ascending, and eigenvectors as tangent vectors (``Params``), orthonormal in the metric.

        ``k=None`` forms the matrix.  Otherwise the ``k`` largest ("LA"), smallest ("SA"), largest in magnitude ("LM")
        or from both ends ("BE"), from products alone.  Options: ``method="krylov"`` (block Krylov subspaces with thick
        restarts, which finds all copies of multiple eigenvalues), ``"eigsh"`` (SciPy's ARPACK, which may miss some) or
        ``"lobpcg"``; ``tol``, of the residuals relative to the largest magnitude (default 1e-10; LOBPCG reaches 1e-8);
        ``maxiter``, ``seed``.  Without ``maxiter``, up to 4096 coordinates, the matrix is formed where the iteration
        would take more products than that.

        Raises ``ValueError`` for ``k`` that is not in 1..d, and when the solver does not converge.
        """
        values, vectors = spectrum.extreme(self, k, which, **options)
        residuals = (self @ vectors - vectors * values).norm(dim=0)
        return spectrum.Eigenpairs(values, [self.space.tangent(v) for v in vectors.unbind(1)], residuals)

    def trace(self, samples: int | None = None, seed: int = 0, method: str = "hutchinson",
              tol: float | None = None) -> Estimate:
        """The trace: exact by d products with ``samples=None``, else estimated from about ``samples`` products.

        method : "hutchinson", "hutch++" or "xtrace"; see :mod:`symgeo.hessian.traces`
        tol : stop as soon as the standard error is within this times the value; ``samples`` is then the most that is
            used, and without it d products, which make the trace exact
        """
        return traces.trace(self, samples, seed, method, tol)

    def diagonal(self, samples: int | None = None, seed: int = 0, tol: float | None = None) -> TensorEstimate:
        """The diagonal ``(d,)`` in the coordinates: exact with ``samples=None``, else estimated; as the trace.

        tol : relative to the norm of the diagonal
        """
        return traces.diagonal(self, samples, seed, tol)

    def logdet(self, damping: float = 0.0, samples: int | None = None, seed: int = 0, steps: int | None = None,
               tol: float | None = None) -> Estimate:
        """``log |det(S + damping I)|``: exact up to 4096 coordinates when ``samples`` is None.

        Otherwise by stochastic Lanczos quadrature with ``samples`` probes (default 16) of ``steps`` products each, by
        default as many, up to 512, as it takes for the error of the quadrature, which is part of the standard error,
        to be small beside that of the probes.  ``-inf`` for a matrix that is singular to rounding.

        tol : stop as soon as the error is within this times the value; ``samples`` (default 256) is then the most

        Raises ``ValueError`` for a negative damping.
        """
        if not 0 <= damping < math.inf:
            raise ValueError(f"damping must be >= 0; got {damping}")
        if samples is None and self.shape[0] <= EXACT:
            values = (self.eigvalsh() + damping).abs()
            return Estimate(float(values.log().sum()) if _regular(values) else -math.inf, products=self.shape[0])
        return quadrature.log_volume(self, damping, log_plan(samples, steps, tol, seed))

    def spectral_density(self, samples: int = 8, steps: int | None = None, points: int = 512,
                         width: float | None = None, seed: int = 0,
                         tol: float | None = None) -> SpectralDensity:
        """The density of eigenvalues, smoothed, by stochastic Lanczos quadrature; see `SpectralDensity`.

        steps : of each of the ``samples`` probes; by default as many, up to 512, as the quadrature needs
        tol : stop as soon as the error, integrated, is within this; ``samples`` is then the most that is used
        """
        return quadrature.density(self, points, width, quadrature.Plan(samples, steps, tol, seed, first=64))

    def near_zero(self, threshold: float = 1e-6, samples: int | None = None, seed: int = 0, steps: int | None = None,
                  tol: float | None = None) -> Estimate:
        """How many eigenvalues have a magnitude up to ``threshold`` times the largest.

        Exact up to 4096 coordinates when ``samples`` is None; otherwise, with 8 probes by default, between ``bounds``,
        and ``converged`` is False where these are too far apart for a number.  ``ValueError`` for a threshold outside
        (0, 1).
        """
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1; got {threshold}")
        if samples is None and self.shape[0] <= EXACT:
            values = self.eigvalsh().abs()
            bound = threshold * (float(values.max()) if len(values) else 0.0)
            return Estimate(float((values <= bound).sum()), products=self.shape[0])
        count = 8 if samples is None else samples
        return quadrature.near_zero(self, threshold, quadrature.Plan(count, steps, tol, seed, first=64, slack=0.5))

    @property
    def parameters(self) -> FlatSpace:
        """The flat space, for operators in parameter coordinates (``ValueError`` for others)."""
        if not isinstance(self.space, FlatSpace):
            raise ValueError(f"the {self.name} acts in a metric-orthonormal frame, not in parameter coordinates")
        return self.space

    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` on arrays of coordinates."""
        return spectrum.to_scipy(self)
