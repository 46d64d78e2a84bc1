"""The block of the trivial kind: diagonal plus low rank, because its size is that of all free axes together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manifolds.linalg import eigh, gram, widen
from symgeo.curvature.dense import SYMMETRIC, DenseBlock
from symgeo.curvature.spectrum import Spectrum, threshold

#: the trivial kind is written as a matrix up to this many copies
DENSE_LIMIT = 4096


@dataclass(frozen=True)
class StructuredBlock:
    """diag(d) + L R^T on M copies.

    Attributes
    ----------
    copies: M
    values: d, (M,), or (1,) for a multiple of the identity
    left, right: (M, r)

    Sums, products and multiples stay in this form. Functions of it do where d is a multiple of the identity, or
    r = 0; others are computed on the dense matrix, and raise ValueError beyond DENSE_LIMIT copies.
    """

    copies: int
    values: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def outer(cls, x: Tensor, y: Tensor) -> StructuredBlock:
        """x y^T for x, y (M, r)."""
        return cls(len(x), x.new_zeros(1), x, y)

    @classmethod
    def diagonal_of(cls, values: Tensor) -> StructuredBlock:
        """diag(values), (M,)."""
        empty = values.new_zeros(len(values), 0)
        return cls(len(values), values, empty, empty)

    @property
    def constant(self) -> bool:
        """Whether d is a multiple of the identity."""
        return len(self.values) == 1

    @property
    def rank(self) -> int:
        """r"""
        return self.left.shape[-1]

    @property
    def symmetric(self) -> bool:
        """Whether L R^T is symmetric up to rounding."""
        if self.right is self.left or not self.rank:
            return True
        basis = torch.linalg.qr(widen(torch.cat([self.left, self.right], dim=-1))).Q
        core = (basis.mT @ widen(self.left)) @ (widen(self.right).mT @ basis)
        return bool((core - core.mT).abs().max() <= SYMMETRIC * core.abs().max())

    def apply(self, x: Tensor) -> Tensor:
        """T x, (1, 1, M, D), in the precision of x."""
        low_rank = self.left.to(x.dtype) @ (self.right.to(x.dtype).mT @ x)
        return self.values.to(x.dtype).unsqueeze(-1) * x + low_rank

    def adjoint(self) -> StructuredBlock:
        """T^T"""
        return StructuredBlock(self.copies, self.values, self.right, self.left)

    def scaled(self, factor: float) -> StructuredBlock:
        """factor T"""
        return StructuredBlock(self.copies, factor * self.values, factor * self.left, self.right)

    def added(self, other: StructuredBlock) -> StructuredBlock:
        """T + T'"""
        left, right = (torch.cat(x, dim=-1) for x in ((self.left, other.left), (self.right, other.right)))
        return StructuredBlock(self.copies, self.values + other.values, left, left if self._both(other) else right)

    def times(self, other: StructuredBlock) -> StructuredBlock:
        """(d + L R^T)(d' + L' R'^T) = d d' + (d L' + L (R^T L')) R'^T + L (d' R)^T"""
        d, other_d = self.values.unsqueeze(-1), other.values.unsqueeze(-1)
        left = torch.cat([d * other.left + self.left @ (self.right.mT @ other.left), self.left], dim=-1)
        right = torch.cat([other.right, other_d * self.right], dim=-1)
        return StructuredBlock(self.copies, self.values * other.values, left, right)

    def congruent(self, a: StructuredBlock) -> StructuredBlock:
        """a T a^T"""
        return a.times(self).times(a.adjoint())

    def trace(self) -> Tensor:
        """The trace."""
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        """(1, 1, M)"""
        return (self.values + (self.left * self.right).sum(-1)).expand(1, 1, self.copies)

    def square(self) -> Tensor:
        """|T|^2"""
        d = self.values.expand(self.copies)
        mixed = (d * (self.left * self.right).sum(-1)).sum()
        return d.square().sum() + 2 * mixed + (gram(self.left) * gram(self.right)).sum()

    def to_dense(self) -> DenseBlock:
        """As a matrix (1, 1, M, M). Raises ValueError beyond DENSE_LIMIT copies."""
        if self.copies > DENSE_LIMIT:
            raise ValueError(
                f"the trivial kind has {self.copies} copies (all sizes on which no group acts together), too many for"
                f" a dense matrix (at most {DENSE_LIMIT}); keep it diagonal or of low rank: trivial='diagonal'"
            )
        matrix = torch.diag(self.values.expand(self.copies)) + self.left @ self.right.mT
        return DenseBlock(matrix[None, None])

    def spectrum(self) -> Spectrum:
        """The eigenvalues d, or those on the range of L, and d on the rest."""
        if self.rank == 0:
            values = widen(self.values).expand(1, 1, self.copies)
            zero = values.new_zeros(1, 1)
            return Spectrum(values, None, 0, zero, zero)
        basis, core = self._core()
        values, vectors = eigh(core)
        values, rest = values + widen(self.values), widen(self.values).reshape(1, 1)
        limit = threshold(torch.maximum(values.abs().max(), rest.abs().max()), self.rank).reshape(1, 1)
        return Spectrum(values[None, None], (basis @ vectors)[None, None], self.copies - self.rank, rest, limit)

    def rebuilt(self, spectrum: Spectrum, values: Tensor, rest: Tensor) -> StructuredBlock:
        """The block with the same eigenvectors and other eigenvalues."""
        if spectrum.vectors is None:
            return StructuredBlock.diagonal_of(values[0, 0])
        vectors = spectrum.vectors[0, 0]
        return StructuredBlock(self.copies, rest.reshape(1), vectors * (values - rest)[0, 0], vectors)

    def pinv(self) -> DenseBlock:
        """The pseudo-inverse, dense."""
        return self.to_dense().pinv()

    def _core(self) -> tuple[Tensor, Tensor]:
        """L R^T = Q core Q^T (if symmetric), Q an orthonormal basis of the range of L."""
        basis = torch.linalg.qr(widen(self.left)).Q
        return basis, (basis.mT @ widen(self.left)) @ (widen(self.right).mT @ basis)

    def _both(self, other: StructuredBlock) -> bool:
        """Whether both are of the form L L^T."""
        return self.left is self.right and other.left is other.right


Block = DenseBlock | StructuredBlock


def add(a: Block, b: Block) -> Block:
    """a + b, structured if both are."""
    if isinstance(a, StructuredBlock) and isinstance(b, StructuredBlock):
        return a.added(b)
    return a.to_dense().added(b.to_dense())


def multiply(a: Block, b: Block) -> Block:
    """a b, structured if both are."""
    if isinstance(a, StructuredBlock) and isinstance(b, StructuredBlock):
        return a.times(b)
    return a.to_dense().times(b.to_dense())


def congruence(a: Block, b: Block) -> Block:
    """a b a^H, structured if both are."""
    if isinstance(a, StructuredBlock) and isinstance(b, StructuredBlock):
        return b.congruent(a)
    return b.to_dense().congruent(a.to_dense())


def simple(block: Block) -> Block:
    """The block whose spectrum is to be computed: a structured one becomes dense where that is the only way."""
    easy = isinstance(block, DenseBlock) or block.rank == 0 or (block.constant and block.rank < block.copies)
    return block if easy else block.to_dense()
