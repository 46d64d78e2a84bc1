"""Permutations of an axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from symgeo.groups import sampling
from symgeo.groups.base import Group


@dataclass(frozen=True)
class Permutation(Group):
    """The symmetric group: an element is an index tensor p with act(p, y)[j] = y[p[j]].

    >>> Permutation().act(torch.tensor([1, 2, 0]), torch.tensor([10., 20., 30.]))
    tensor([20., 30., 10.])
    """

    orthogonal: ClassVar[bool] = True
    discrete: ClassVar[bool] = True
    monomial: ClassVar[bool] = True

    def element_shape(self, n: int) -> tuple[int, ...]:
        """(n,)"""
        return (n,)

    def dimension(self, n: int) -> int:
        """0"""
        return 0

    def apply(self, g: Tensor, rows: Tensor, dual: bool) -> Tensor:
        """rows[..., g]"""
        if g.dim() == 1:
            return rows.index_select(-1, g.to(rows.device))
        return rows.gather(-1, g.to(rows.device).unsqueeze(-2).expand(rows.shape))

    def identity(
        self,
        n: int,
        batch: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """0, 1, ..., n - 1"""
        return torch.arange(n, device=device).expand(*batch, n).clone()

    def draw(
        self,
        n: int,
        batch: tuple[int, ...],
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Tensor:
        """Uniform permutations."""
        return sampling.uniform((*batch, n), generator, torch.float64, None).argsort(-1).to(device)

    def inverse(self, g: Tensor) -> Tensor:
        """p^-1"""
        return g.argsort(-1)

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        """j -> h[g[j]], because h acts first."""
        return h.gather(-1, g)

    def algebra(self, coefficients: Tensor, n: int) -> Tensor:
        """Zero."""
        return coefficients.new_zeros(*coefficients.shape[:-1], n)

    def orbit_dimension(self, plain: Tensor, dual: Tensor) -> int:
        """0"""
        return 0
