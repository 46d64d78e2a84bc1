"""Groups of matrices: all invertible ones, and the orthogonal ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from symgeo.groups import sampling
from symgeo.groups.base import Group


@dataclass(frozen=True)
class Matrices(Group):
    """What matrix groups share: an element A of shape (n, n) maps y to A y."""

    monomial: ClassVar[bool] = False

    def element_shape(self, n: int) -> tuple[int, ...]:
        """(n, n)"""
        return (n, n)

    def identity(
        self,
        n: int,
        batch: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The identity matrix."""
        return torch.eye(n, dtype=dtype, device=device).expand(*batch, n, n).clone()

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        """g @ h"""
        return g @ h


@dataclass(frozen=True)
class Orthogonal(Matrices):
    """O(n), both determinant signs.

    >>> quarter = torch.tensor([[0., -1.], [1., 0.]])
    >>> Orthogonal().act(quarter, torch.tensor([3., 5.]))
    tensor([-5.,  3.])
    """

    orthogonal: ClassVar[bool] = True
    discrete: ClassVar[bool] = False

    def dimension(self, n: int) -> int:
        """n (n - 1) / 2"""
        return n * (n - 1) // 2

    def apply(self, g: Tensor, rows: Tensor, dual: bool) -> Tensor:
        """rows @ g^T; the dual is the same."""
        return rows @ g.to(rows).mT

    def draw(
        self,
        n: int,
        batch: tuple[int, ...],
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Tensor:
        """Uniform (Haar)."""
        return sampling.haar(n, batch, generator, dtype, device)

    def inverse(self, g: Tensor) -> Tensor:
        """g^T"""
        return g.mT

    def algebra(self, coefficients: Tensor, n: int) -> Tensor:
        """Skew matrices, from their entries below the diagonal."""
        i, j = torch.tril_indices(n, n, offset=-1, device=coefficients.device)
        lower = coefficients.new_zeros(*coefficients.shape[:-1], n, n)
        lower[..., i, j] = coefficients
        return lower - lower.mT

    def orbit_dimension(self, plain: Tensor, dual: Tensor) -> int:
        """dim O(n) - dim O(n - r), with r the rank of all rows together."""
        n = plain.shape[-1]
        rest = n - _rank(torch.cat([plain, dual], dim=-2))
        return int((self.dimension(n) - rest * (rest - 1) // 2).sum())


@dataclass(frozen=True)
class GeneralLinear(Matrices):
    """GL(n), both determinant signs.

    >>> A = torch.tensor([[1., 1.], [0., 1.]])
    >>> GeneralLinear().act(A, torch.tensor([3., 5.]))
    tensor([8., 5.])
    >>> GeneralLinear().act(A, torch.tensor([3., 5.]), dual=True)
    tensor([3., 2.])
    """

    orthogonal: ClassVar[bool] = False
    discrete: ClassVar[bool] = False

    def dimension(self, n: int) -> int:
        """n^2"""
        return n * n

    def apply(self, g: Tensor, rows: Tensor, dual: bool) -> Tensor:
        """rows @ g^T, or rows @ g^-1 for the dual."""
        right = torch.linalg.inv(g) if dual else g.mT
        return rows @ right.to(rows)

    def draw(
        self,
        n: int,
        batch: tuple[int, ...],
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Tensor:
        """Q1 diag(exp(N / 2)) Q2, Q1 and Q2 uniform on O(n): well conditioned."""
        left = sampling.haar(n, batch, generator, dtype, device)
        right = sampling.haar(n, batch, generator, dtype, device)
        singular = (0.5 * sampling.normal((*batch, 1, n), generator, dtype, device)).exp()
        return (left * singular) @ right

    def inverse(self, g: Tensor) -> Tensor:
        """g^-1"""
        return torch.linalg.inv(g)

    def algebra(self, coefficients: Tensor, n: int) -> Tensor:
        """All matrices, row by row."""
        return coefficients.reshape(*coefficients.shape[:-1], n, n)

    def orbit_dimension(self, plain: Tensor, dual: Tensor) -> int:
        """n^2 - (n - rank plain)(n - rank dual): xi moves nothing when plain xi^T = dual xi = 0."""
        n = plain.shape[-1]
        return int((n * n - (n - _rank(plain)) * (n - _rank(dual))).sum())


def _rank(rows: Tensor) -> Tensor:
    """Numerical ranks of (*batch, m, n); a QR first, because m can be a vocabulary."""
    if rows.shape[-2] == 0 or rows.shape[-1] == 0:
        return torch.zeros(rows.shape[:-2], dtype=torch.int64, device=rows.device)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.linalg.matrix_rank(torch.linalg.qr(wide, mode="r").R)
