"""Groups that multiply each coordinate by a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from symgeo.groups import sampling
from symgeo.groups.base import Group, nonzero_columns


@dataclass(frozen=True)
class Diagonal(Group):
    """What signs and positive scalings share: an element is the vector of its n factors."""

    monomial: ClassVar[bool] = True
    scalar_per: ClassVar[bool] = True

    def element_shape(self, n: int) -> tuple[int, ...]:
        """(n,)"""
        return (n,)

    def apply(self, g: Tensor, rows: Tensor, dual: bool) -> Tensor:
        """rows * g, or rows / g for the dual."""
        factors = 1 / g if dual else g
        return rows * factors.to(rows).unsqueeze(-2)

    def identity(
        self,
        n: int,
        batch: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Ones."""
        return torch.ones(*batch, n, dtype=dtype, device=device)

    def inverse(self, g: Tensor) -> Tensor:
        """1 / g"""
        return 1 / g

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        """g * h"""
        return g * h


@dataclass(frozen=True)
class SignFlip(Diagonal):
    """{-1, 1}^n. With `per`, its factor has size 1: one sign for each index of that factor.

    >>> SignFlip().act(torch.tensor([-1., 1.]), torch.tensor([5., 7.]))
    tensor([-5.,  7.])
    """

    orthogonal: ClassVar[bool] = True
    discrete: ClassVar[bool] = True

    def dimension(self, n: int) -> int:
        """0"""
        return 0

    def draw(
        self,
        n: int,
        batch: tuple[int, ...],
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Tensor:
        """Fair signs."""
        coin = sampling.uniform((*batch, n), generator, dtype, device)
        return torch.where(coin < 0.5, -1.0, 1.0).to(dtype)

    def algebra(self, coefficients: Tensor, n: int) -> Tensor:
        """Zero."""
        return coefficients.new_zeros(*coefficients.shape[:-1], n)

    def orbit_dimension(self, plain: Tensor, dual: Tensor) -> int:
        """0"""
        return 0


@dataclass(frozen=True)
class PositiveScaling(Diagonal):
    """Positive numbers, one for each coordinate. With `per`, one for each index of that factor.

    >>> PositiveScaling().act(torch.tensor([2., 4.]), torch.tensor([5., 8.]), dual=True)
    tensor([2.5000, 2.0000])
    """

    orthogonal: ClassVar[bool] = False
    discrete: ClassVar[bool] = False

    def dimension(self, n: int) -> int:
        """n"""
        return n

    def draw(
        self,
        n: int,
        batch: tuple[int, ...],
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Tensor:
        """exp(N / 2), N standard normal."""
        return (0.5 * sampling.normal((*batch, n), generator, dtype, device)).exp()

    def algebra(self, coefficients: Tensor, n: int) -> Tensor:
        """The logarithms of the factors."""
        return coefficients

    def orbit_dimension(self, plain: Tensor, dual: Tensor) -> int:
        """The number of coordinates that are not identically zero."""
        return int(nonzero_columns(plain, dual).sum())
