"""The linear maps that commute with rotary position embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from symgeo.errors import SymmetryError
from symgeo.groups import sampling
from symgeo.groups.base import Group, nonzero_columns


@dataclass(frozen=True)
class Rotary(Group):
    """(C \\ 0)^(n/2): each pair of coordinates is a complex number, multiplied by a complex number c.

    The dual multiplies by 1 / conj(c). An element is a complex tensor (n/2,).

    Parameters
    ----------
    pairing: "half" pairs the coordinates (i, i + n/2), as transformers' `rotate_half` does;
        "interleaved" pairs (2i, 2i + 1).

    >>> Rotary().act(torch.tensor([1j]), torch.tensor([3., 5.]))
    tensor([-5.,  3.])
    """

    pairing: str = "half"

    orthogonal: ClassVar[bool] = False
    discrete: ClassVar[bool] = False
    monomial: ClassVar[bool] = False
    multiple: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.pairing not in ("half", "interleaved"):
            raise SymmetryError(f"Rotary: pairing must be 'half' or 'interleaved', found {self.pairing!r}")

    def element_shape(self, n: int) -> tuple[int, ...]:
        """(n / 2,)"""
        return (n // 2,)

    def dimension(self, n: int) -> int:
        """n"""
        return n

    def apply(self, g: Tensor, rows: Tensor, dual: bool) -> Tensor:
        """Complex multiplication in real arithmetic, so that it exists in every dtype."""
        factors = 1 / g.conj() if dual else g
        re, im = factors.real.to(rows).unsqueeze(-2), factors.imag.to(rows).unsqueeze(-2)
        x, y = self._pairs(rows).unbind(-1)
        turned = torch.stack([re * x - im * y, im * x + re * y], dim=-1)
        return (turned if self.pairing == "interleaved" else turned.mT).reshape(rows.shape)

    def identity(
        self,
        n: int,
        batch: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Complex ones."""
        real = dtype or torch.get_default_dtype()
        return torch.ones(*batch, n // 2, dtype=real.to_complex(), device=device)

    def draw(
        self,
        n: int,
        batch: tuple[int, ...],
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Tensor:
        """Modulus exp(N / 2), uniform phase."""
        modulus = (0.5 * sampling.normal((*batch, n // 2), generator, dtype, device)).exp()
        phase = 2 * math.pi * sampling.uniform((*batch, n // 2), generator, dtype, device)
        return torch.polar(modulus, phase)

    def inverse(self, g: Tensor) -> Tensor:
        """1 / g"""
        return 1 / g

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        """g * h"""
        return g * h

    def algebra(self, coefficients: Tensor, n: int) -> Tensor:
        """Complex numbers, from (real, imaginary) pairs."""
        re, im = coefficients.unflatten(-1, (n // 2, 2)).unbind(-1)
        return torch.complex(re, im)

    def orbit_dimension(self, plain: Tensor, dual: Tensor) -> int:
        """2 for every pair that is not identically zero."""
        used = nonzero_columns(plain, dual).unsqueeze(-2)
        return 2 * int(self._pairs(used).any(-1).sum())

    def _pairs(self, rows: Tensor) -> Tensor:
        """(..., n) -> (..., n/2, 2)"""
        half = rows.shape[-1] // 2
        if self.pairing == "interleaved":
            return rows.unflatten(-1, (half, 2))
        return rows.unflatten(-1, (2, half)).mT
