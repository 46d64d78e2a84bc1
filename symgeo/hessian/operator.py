"""The linear operator that every curvature matrix here is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from symgeo.functional import Params
from symgeo.hessian import lanczos, spectrum, traces
from symgeo.hessian.derivatives import asymmetry, not_symmetric, probes
from symgeo.hessian.estimate import Estimate, TensorEstimate
from symgeo.hessian.space import FlatSpace, Space

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Product = Callable[[Tensor], Tensor]

#: numbers that are differentiated at once, columns times parameters, unless ``chunk`` says otherwise
_AT_ONCE = 2**22
#: up to this size ``logdet`` is exact unless samples are asked for
EXACT = 2048


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
            return self.space.tangent(self._columns(self.space.coordinates(other).unsqueeze(1)).squeeze(1))
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim not in (1, 2) or other.shape[0] != self.shape[0]:
            size = self.shape[0]
            raise ValueError(f"{self.name} @ needs a tensor ({size},) or ({size}, k), or Params; "
                             f"got {tuple(other.shape)}")
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
        return spectrum.extreme(self, k, which, **options)[0]

    def eigh(self, k: int | None = None, which: str = "LA", **options: Any) -> spectrum.Eigenpairs:
        """Eigenvalues, ascending, and eigenvectors as tangent vectors (``Params``), orthonormal in the metric.

        ``k=None`` forms the matrix.  Otherwise the ``k`` largest ("LA"), smallest ("SA"), largest in magnitude ("LM")
        or from both ends ("BE"), from products alone.  Options: ``method="eigsh"`` (implicitly restarted Lanczos) or
        ``"lobpcg"``, ``tol`` (relative; default 1e-10), ``maxiter``, ``seed``.

        Raises ``ValueError`` for ``k`` that is not in 1..d, and when the solver does not converge.
        """
        values, vectors = spectrum.extreme(self, k, which, **options)
        return spectrum.Eigenpairs(values, [self.space.tangent(v) for v in vectors.unbind(1)])

    def trace(self, samples: int | None = None, seed: int = 0, method: str = "hutchinson") -> Estimate:
        """The trace: exact by d products with ``samples=None``, else estimated from about ``samples`` products.

        method : "hutchinson", "hutch++" or "xtrace"; see :mod:`symgeo.hessian.traces`.
        """
        return traces.trace(self, samples, seed, method)

    def diagonal(self, samples: int | None = None, seed: int = 0) -> TensorEstimate:
        """The diagonal ``(d,)`` in the coordinates: exact with ``samples=None``, else estimated."""
        return traces.diagonal(self, samples, seed)

    def logdet(self, damping: float = 0.0, samples: int | None = None, seed: int = 0, steps: int = 64) -> Estimate:
        """``log |det(S + damping I)|``: exact up to 2048 coordinates when ``samples`` is None.

        Otherwise by stochastic Lanczos quadrature with ``samples`` probes (default 16) of ``steps`` products each.
        ``-inf`` for a singular matrix.  Raises ``ValueError`` for a negative damping.
        """
        if not damping >= 0:
            raise ValueError(f"damping must be >= 0; got {damping}")
        if samples is None and self.shape[0] <= EXACT:
            return Estimate(float((self.eigvalsh() + damping).abs().log().sum()))
        return lanczos.trace_of(self, lambda s: (s + damping).abs().log(), samples or 16, steps, seed)

    def spectral_density(self, samples: int = 8, steps: int = 64, points: int = 512, width: float | None = None,
                         seed: int = 0) -> lanczos.SpectralDensity:
        """The density of eigenvalues, smoothed, by stochastic Lanczos quadrature; see `SpectralDensity`."""
        return lanczos.density(self, samples, steps, points, width, seed)

    @property
    def parameters(self) -> FlatSpace:
        """The flat space, for operators in parameter coordinates (``ValueError`` for others)."""
        if not isinstance(self.space, FlatSpace):
            raise ValueError(f"the {self.name} acts in a metric-orthonormal frame, not in parameter coordinates")
        return self.space

    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` on arrays of coordinates."""
        return spectrum.to_scipy(self)
