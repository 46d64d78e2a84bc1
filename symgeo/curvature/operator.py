"""Linear maps of parameter space that commute with a symmetry, and their exact algebra."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from torch import Tensor

from symgeo.curvature.decomposition import Decomposition
from symgeo.curvature.spectrum import Spectrum, check_damping, damped_power, largest_of
from symgeo.curvature.structured import Block, add, congruence, multiply, simple
from symgeo.curvature.transport import transported
from symgeo.functional import Params

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

#: the operator is written as one matrix up to this many parameters
_DENSE_LIMIT = 8192


class InvariantOperator:
    r"""A linear map S of parameter space with ``A S A^T = S`` for every element A of a compact group.

    On the copies of each kind of representation it is a matrix ``T`` (Schur's lemma): ``X -> T X``, so that
    ``f(S)`` is ``T -> f(T)``, and with the dimension ``d`` of the representation

        trace S = sum d tr T,   logdet S = sum d logdet T,   |S|^2 = sum d |T|^2,

    and every eigenvalue of T occurs d times.  The matrix of S itself is never formed, except by :meth:`dense`.

    Functions of S need it symmetric.  Damping is relative to the largest absolute eigenvalue ``s_max`` of all blocks:
    ``power(p, damping) = U diag((|s| + damping s_max)^p) U^T``.  Without damping, whole powers are the ordinary
    ones (``s^p``, signs included), others those of ``|s|``, and 0 has the power 0: a pseudo-inverse for
    negative p, in which eigenvalues of a block below ``4 eps max(M, D)`` times its largest count as 0.

    Operators act on ``Params`` of the shapes they were made for, and keep dtypes and names; frozen parameters come
    back as zeros.  Two operators combine if they belong to the same symmetry and shapes.

    Attributes
    ----------
    decomposition: the kinds; blocks: one `DenseBlock` or `StructuredBlock` for each of its buckets
    """

    def __init__(self, decomposition: Decomposition, blocks: Sequence[Block]) -> None:
        if len(blocks) != len(decomposition.buckets):
            raise ValueError(f"needed one block for each of {len(decomposition.buckets)} buckets; got {len(blocks)}")
        self.decomposition, self.blocks = decomposition, tuple(blocks)

    def __repr__(self) -> str:
        return f"InvariantOperator({_description(self)})"

    def apply(self, coordinates: Sequence[Tensor]) -> list[Tensor]:
        """The map in the coordinates of `Decomposition.encode`: T X for every bucket, in the precision of X."""
        return [block.apply(x) for block, x in zip(self.blocks, coordinates)]

    @overload
    def __matmul__(self, other: InvariantOperator) -> InvariantOperator: ...
    @overload
    def __matmul__(self, other: Mapping[str, Tensor]) -> Params: ...

    def __matmul__(self, other: InvariantOperator | Mapping[str, Tensor]) -> InvariantOperator | Params:
        if isinstance(other, InvariantOperator):
            return self._combined(other, multiply)
        if not isinstance(other, Mapping):
            return NotImplemented
        moved = self.decomposition.decode(self.apply(self.decomposition.encode(other, torch.float64)))
        return self.decomposition.restore(moved, dict(other))

    def __add__(self, other: InvariantOperator) -> InvariantOperator:
        return self._combined(other, add)

    def __sub__(self, other: InvariantOperator) -> InvariantOperator:
        return self + (-other)

    def __neg__(self) -> InvariantOperator:
        return -1.0 * self

    def __mul__(self, factor: float) -> InvariantOperator:
        return InvariantOperator(self.decomposition, [block.scaled(float(factor)) for block in self.blocks])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> InvariantOperator:
        return (1.0 / float(divisor)) * self

    @property
    def T(self) -> InvariantOperator:
        """The transpose."""
        return InvariantOperator(self.decomposition, [block.adjoint() for block in self.blocks])

    @property
    def symmetric(self) -> bool:
        """Whether the map is symmetric up to rounding."""
        return all(block.symmetric for block in self.blocks)

    def congruent(self, a: InvariantOperator) -> InvariantOperator:
        """``a S a^T`` for this S, in the form that keeps most accuracy."""
        return a._combined(self, congruence)

    def power(self, p: float, damping: float = 0.0) -> InvariantOperator:
        """``U diag((|s| + damping s_max)^p) U^T``; see the class for damping 0.

        Raises ValueError if the operator is not symmetric, or damping negative.
        """
        check_damping(damping)
        return self._function("power", damping, lambda largest: damped_power(p, damping, largest))

    def sqrt(self) -> InvariantOperator:
        """``power(1/2)``"""
        return self.power(0.5)

    def inv(self, damping: float = 0.0) -> InvariantOperator:
        """The pseudo-inverse or, with damping, ``power(-1, damping)``."""
        if damping == 0 and not self.symmetric:
            return InvariantOperator(self.decomposition, [block.pinv() for block in self.blocks])
        return self.power(-1, damping)

    def solve(self, u: Mapping[str, Tensor], damping: float = 0.0) -> Params:
        """``inv(damping) @ u``"""
        return self.inv(damping) @ u

    def trace(self) -> Tensor:
        """A scalar."""
        return self._sum([block.trace() for block in self.blocks])

    def frobenius(self) -> Tensor:
        """The Frobenius norm, a scalar."""
        return self._sum([block.square() for block in self.blocks]).clamp_min(0).sqrt()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """``sum log(|s| + damping s_max)`` over all eigenvalues, a scalar; -inf if one is zero.

        Raises ValueError if the operator is not symmetric, or damping negative.
        """
        check_damping(damping)
        spectra = self._spectra("logdet")[1]
        shift = damping * largest_of([s.largest for s in spectra], damping)
        sums = []
        for s in spectra:
            values, rest = s.map(lambda v, zero: (torch.where(zero, 0.0, v.abs()) + shift).log())
            sums.append(values.sum() + (s.count * rest.sum() if s.count else 0.0))
        return self._sum(sums)

    def eigvals(self) -> list[tuple[float, int]]:
        """The eigenvalues of all blocks, descending, with their multiplicities (equal ones are not merged).

        Raises ValueError if the operator is not symmetric.
        """
        found: list[tuple[float, int]] = []
        for bucket, s in zip(self.decomposition.buckets, self._spectra("eigvals")[1]):
            found += [(value, bucket.dimension) for value in s.values.flatten().tolist()]
            if s.count:
                found += [(value, bucket.dimension * s.count) for value in s.rest.flatten().tolist()]
        return sorted(found, key=lambda pair: -pair[0])

    def diag(self) -> Params:
        """The diagonal, shaped like the parameters."""
        spread = self.decomposition.spread([block.diagonal() for block in self.blocks])
        like = {name: torch.zeros(shape, device=self.decomposition.device, dtype=torch.float64)
                for name, shape in self.decomposition.shapes.items()}
        return self.decomposition.restore(spread, like)

    def dense(self) -> Tensor:
        """The matrix (N, N) in flat order. Raises ValueError for more than 8192 parameters: use `to_scipy`."""
        n = self.decomposition.size
        if n > _DENSE_LIMIT:
            raise ValueError(f"dense needs at most {_DENSE_LIMIT} parameters, found {n}; use to_scipy() or @")
        eye = torch.eye(n, dtype=torch.float64, device=self.decomposition.device)
        columns: Tensor = torch.func.vmap(self._flat, chunk_size=256)(eye)
        return columns.mT

    def to_scipy(self) -> LinearOperator:
        """A `scipy.sparse.linalg.LinearOperator` on flat float64 vectors."""
        from scipy.sparse.linalg import LinearOperator

        n, device, adjoint = self.decomposition.size, self.decomposition.device, self.T

        def product(operator: InvariantOperator) -> Callable[[np.ndarray], np.ndarray]:
            def apply(x: np.ndarray) -> np.ndarray:
                return operator._flat(torch.as_tensor(x, dtype=torch.float64).to(device).reshape(-1)).cpu().numpy()

            return apply

        return LinearOperator((n, n), matvec=product(self), rmatvec=product(adjoint), dtype=np.float64)

    def transport(self, params: Mapping[str, Tensor]) -> InvariantOperator:
        """The same blocks on parameters of another size: the operator of a wider or narrower model.

        Raises ValueError if those have kinds, or numbers of copies, that this operator does not have.
        """
        target = Decomposition(self.decomposition.symmetry, params, self.decomposition.compact)
        return InvariantOperator(target, transported(self.decomposition, self.blocks, target))

    def _flat(self, x: Tensor) -> Tensor:
        return self.decomposition.flatten(self @ self.decomposition.unflatten(x))

    def _combined(self, other: InvariantOperator, rule: Callable[[Block, Block], Block]) -> InvariantOperator:
        if not isinstance(other, InvariantOperator):
            raise TypeError(f"an InvariantOperator combines with another one, or a number; got {type(other).__name__}")
        if not self.decomposition.same(other.decomposition):
            raise ValueError(
                "the two operators belong to different symmetries, shapes or orders of parameters: "
                f"{_description(self)} and {_description(other)}; compute both from the same symmetry and parameters"
            )
        return InvariantOperator(self.decomposition, [rule(a, b) for a, b in zip(self.blocks, other.blocks)])

    def _function(
        self, what: str, damping: float, function: Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]]
    ) -> InvariantOperator:
        blocks, spectra = self._spectra(what)
        rule = function(largest_of([s.largest for s in spectra], damping))
        return InvariantOperator(
            self.decomposition, [block.rebuilt(s, *s.map(rule)) for block, s in zip(blocks, spectra)]
        )

    def _spectra(self, what: str) -> tuple[list[Block], list[Spectrum]]:
        for bucket, block in zip(self.decomposition.buckets, self.blocks):
            if not block.symmetric:
                kind = " x ".join(f"{name}:{label}" for name, label in bucket.kinds[0]) or "trivial"
                raise ValueError(f"{what} needs a symmetric operator; the block of kind {kind} is not symmetric")
        blocks = [simple(block) for block in self.blocks]
        return blocks, [block.spectrum() for block in blocks]

    def _sum(self, terms: Sequence[Tensor]) -> Tensor:
        """sum d t"""
        weighted = [bucket.dimension * t for bucket, t in zip(self.decomposition.buckets, terms)]
        return torch.stack(weighted).sum() if weighted else torch.zeros((), dtype=torch.float64)


def _description(operator: InvariantOperator) -> str:
    decomposition = operator.decomposition
    kinds = sum(len(bucket.kinds) for bucket in decomposition.buckets)
    return f"{decomposition.size} parameters in {kinds} kinds"

