"""Cyclic shifts of an axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from symgeo.groups import sampling
from symgeo.groups.base import Group


@dataclass(frozen=True)
class Cyclic(Group):
    """The cyclic group Z_n: an element is a whole number k with act(k, y)[j] = y[(j - k) mod n], as `torch.roll`.

    >>> Cyclic().act(torch.tensor(1), torch.tensor([10., 20., 30.]))
    tensor([30., 10., 20.])
    """

    orthogonal: ClassVar[bool] = True
    discrete: ClassVar[bool] = True
    #: shifts move coordinates without changing them, but families numbered by a cyclic factor are not supported
    monomial: ClassVar[bool] = False

    def element_shape(self, n: int) -> tuple[int, ...]:
        """()"""
        return ()

    def dimension(self, n: int) -> int:
        """0"""
        return 0

    def apply(self, g: Tensor, rows: Tensor, dual: bool) -> Tensor:
        """rows[..., (j - k) mod n]; the dual is the same."""
        n = rows.shape[-1]
        source = (torch.arange(n, device=rows.device) - g.to(rows.device).round().long().unsqueeze(-1)) % n
        return rows.gather(-1, source.unsqueeze(-2).expand(rows.shape))

    def identity(
        self,
        n: int,
        batch: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """0"""
        return torch.zeros(batch, dtype=torch.int64, device=device)

    def draw(
        self,
        n: int,
        batch: tuple[int, ...],
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Tensor:
        """Uniform shifts 0, 1, ..., n - 1."""
        return (n * sampling.uniform(batch, generator, torch.float64, None)).long().to(device)

    def inverse(self, g: Tensor) -> Tensor:
        """-k"""
        return -g

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        """The sum of the shifts."""
        return g + h

    def algebra(self, coefficients: Tensor, n: int) -> Tensor:
        """Zero."""
        return coefficients.new_zeros(coefficients.shape[:-1])

    def orbit_dimension(self, plain: Tensor, dual: Tensor) -> int:
        """0"""
        return 0
