"""Blocks of an invariant operator as matrices: (K, B, M, M) for the K kinds of a bucket."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manifolds.linalg import eigh, widen
from symgeo.curvature.spectrum import Spectrum, threshold

#: relative asymmetry up to which a matrix counts as symmetric: what products of operators leave
SYMMETRIC = 1e-9


@dataclass(frozen=True)
class DenseBlock:
    """Matrices T, real or complex.

    Attributes
    ----------
    matrix: (K, B, M, M)
    root: (K, B, M, R) with matrix = root root^H, where one is known: its singular values are more accurate than
        the eigenvalues of the matrix
    """

    matrix: Tensor
    root: Tensor | None = None

    @classmethod
    def outer(cls, root: Tensor) -> DenseBlock:
        """root root^H"""
        return cls(root @ root.mH, root)

    @property
    def copies(self) -> int:
        """M"""
        return self.matrix.shape[-1]

    @property
    def symmetric(self) -> bool:
        """Whether the matrices are Hermitian up to rounding."""
        if self.root is not None or not self.matrix.numel():
            return True
        size = self.matrix.abs().amax((-2, -1))
        return bool(((self.matrix - self.matrix.mH).abs().amax((-2, -1)) <= SYMMETRIC * size).all())

    def to_dense(self) -> DenseBlock:
        """Itself."""
        return self

    def apply(self, x: Tensor) -> Tensor:
        """T x, (K, B, M, D), in the precision of x."""
        return self.matrix.to(x.dtype) @ x

    def adjoint(self) -> DenseBlock:
        """T^H"""
        return self if self.root is not None else DenseBlock(self.matrix.mH)

    def scaled(self, factor: float) -> DenseBlock:
        """factor T"""
        return DenseBlock(factor * self.matrix)

    def added(self, other: DenseBlock) -> DenseBlock:
        """T + T'"""
        return DenseBlock(self.matrix + other.matrix)

    def times(self, other: DenseBlock) -> DenseBlock:
        """T T'"""
        return DenseBlock(self.matrix @ other.matrix)

    def congruent(self, a: DenseBlock) -> DenseBlock:
        """a T a^H, with its root if T has one."""
        if self.root is not None:
            return DenseBlock.outer(a.matrix @ self.root)
        product = a.matrix @ self.matrix @ a.matrix.mH
        return DenseBlock(0.5 * (product + product.mH))

    def trace(self) -> Tensor:
        """The sum of all traces."""
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        """(K, B, M), the real part."""
        return self.matrix.diagonal(dim1=-2, dim2=-1).real

    def square(self) -> Tensor:
        """|T|^2, the sum over all."""
        return self.matrix.abs().square().sum()

    def spectrum(self) -> Spectrum:
        """By the singular values of the root if there is one, otherwise by eigh."""
        if self.root is None:
            values, vectors = eigh(widen(self.matrix))
            limit = threshold(values.abs().amax(-1), self.copies)
            return Spectrum(values, vectors, 0, torch.zeros_like(limit), limit)
        u, s, _ = torch.linalg.svd(widen(self.root), full_matrices=False)
        values = s.square()
        limit = threshold(values.amax(-1), max(self.root.shape[-2:]), squared=True)
        return Spectrum(values, u, self.copies - s.shape[-1], torch.zeros_like(limit), limit)

    def rebuilt(self, spectrum: Spectrum, values: Tensor, rest: Tensor) -> DenseBlock:
        """The matrices with the same eigenvectors and other eigenvalues."""
        vectors = spectrum.vectors
        assert vectors is not None
        if not spectrum.count:
            return DenseBlock((vectors * values.unsqueeze(-2)) @ vectors.mH)
        shifted = (vectors * (values - rest.unsqueeze(-1)).unsqueeze(-2)) @ vectors.mH
        eye = torch.eye(self.copies, dtype=shifted.dtype, device=shifted.device)
        return DenseBlock(shifted + rest[..., None, None] * eye)

    def pinv(self) -> DenseBlock:
        """The pseudo-inverse of matrices that need not be symmetric."""
        return DenseBlock(torch.linalg.pinv(widen(self.matrix)))
