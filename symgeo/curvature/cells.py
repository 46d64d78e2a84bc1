"""Transforms of off-diagonal cells y_ij, i != j, whose entries move under groups of their own for each unit i."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from symgeo.curvature.permuted import off_diagonal
from symgeo.curvature.transform import OutAxis, Output


def _without_diagonal(x: Tensor) -> Tensor:
    """x (..., n, n, e) without y_ii."""
    return off_diagonal(x.movedim(-1, 0)).movedim(0, -1)


def _everywhere(t: Tensor, n: int, cells: tuple[int, ...]) -> Tensor:
    """The value t (...) on every off-diagonal entry (..., n, n, *cells)."""
    flat = off_diagonal(t[..., None, None].expand(*t.shape, n, n))
    return flat[(..., *[None] * len(cells))].expand(*flat.shape, *cells)


@dataclass(frozen=True)
class HalfCells:
    """S_n wr O(e) on (..., n, n, e), i != j, where y_ij transforms by the group of i alone:

        V: sum_j y_ij / sqrt(n - 1), equivalent to one irreducible axis of length n e;
        the rest, of dimension n e (n - 2) (derived here).

    Participants: the permutation, the group inside.
    """

    size: int
    cell: int

    exact = False

    @property
    def outputs(self) -> tuple[Output, ...]:
        """V (..., n, e) and, for n > 2, the rest (..., n, n, e)."""
        n, e = self.size, self.cell
        rows, inner = OutAxis("coordinate", n), OutAxis("coordinate", e, owner=1)
        vector = Output(((1, "V"),), (rows, inner), n * e)
        rest = Output(((0, "rest"), (1, "V")), (rows, OutAxis("coordinate", n, place=1), inner), n * e * (n - 2))
        return (vector, rest) if n > 2 else (vector,)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Row sums, and what they leave."""
        vector = x.sum(-2) / math.sqrt(self.size - 1)
        return [vector, x - self._rows(vector)] if self.size > 2 else [vector]

    def inverse(self, parts: list[Tensor]) -> Tensor:
        """The sum of both."""
        rows = self._rows(parts[0])
        return rows + parts[1] if self.size > 2 else rows

    def spread(self, parts: list[Tensor]) -> Tensor:
        """t_V / (n - 1) + t_rest (n - 2) / (n - 1)"""
        n = self.size
        t = parts[0] / (n - 1)
        if n > 2:
            t = t + parts[1] * ((n - 2) / (n - 1))
        return _everywhere(t, n, (self.cell,))

    def _rows(self, vector: Tensor) -> Tensor:
        spread = vector.unsqueeze(-2) / math.sqrt(self.size - 1)
        return _without_diagonal(spread.expand(*vector.shape[:-1], self.size, self.cell))


@dataclass(frozen=True)
class EqualCells:
    """S_n wr O(e) on (..., n, n, e, e), i != j, y_ij -> A_i y_ij A_j^T: symmetric and antisymmetric under
    y_ij <-> y_ji^T, each irreducible of dimension n (n - 1) e^2 / 2.

    Participants: the permutation, the group inside.
    """

    size: int
    cell: int

    exact = True

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Both (..., n, n, e, e)."""
        n, e = self.size, self.cell
        axes = tuple(OutAxis("coordinate", s, owner, place) for s, owner in ((n, 0), (e, 1)) for place in (0, 1))
        dimension = n * (n - 1) * e * e // 2
        return tuple(Output(((0, label), (1, "V")), axes, dimension) for label in ("off+", "off-"))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Half the sum, half the difference."""
        swapped = x.transpose(-4, -3).mT
        return [0.5 * (x + swapped), 0.5 * (x - swapped)]

    def inverse(self, parts: list[Tensor]) -> Tensor:
        """The sum."""
        return parts[0] + parts[1]

    def spread(self, parts: list[Tensor]) -> Tensor:
        """The mean of both."""
        return _everywhere(0.5 * (parts[0] + parts[1]), self.size, (self.cell, self.cell))


@dataclass(frozen=True)
class UnequalCells:
    """S_n wr (O(e) x O(f)) on (..., n, n, e, f), i != j: irreducible, of dimension n (n - 1) e f.

    Participants: the permutation, the two groups inside.
    """

    size: int
    cells: tuple[int, int]

    exact = True

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The tensor itself."""
        n, (e, f) = self.size, self.cells
        pair = (OutAxis("coordinate", n), OutAxis("coordinate", n, place=1))
        inner = (OutAxis("coordinate", e, owner=1), OutAxis("coordinate", f, owner=2))
        return (Output(((0, "off"), (1, "V"), (2, "V")), (*pair, *inner), n * (n - 1) * e * f),)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x"""
        return [x]

    def inverse(self, parts: list[Tensor]) -> Tensor:
        """x"""
        return parts[0]

    def spread(self, parts: list[Tensor]) -> Tensor:
        """Constant off the diagonal."""
        return _everywhere(parts[0], self.size, self.cells)


@dataclass(frozen=True)
class Matrix:
    """O(n) on both axes of (..., n, n): the trace / sqrt(n), the traceless symmetric part S of dimension
    (n - 1) (n + 2) / 2, and the antisymmetric part A of dimension n (n - 1) / 2."""

    size: int

    exact = False

    @property
    def outputs(self) -> tuple[Output, ...]:
        """1 and, for n > 1, S and A."""
        n = self.size
        axes = (OutAxis("coordinate", n), OutAxis("coordinate", n, place=1))
        kinds = (Output(((0, "S"),), axes, (n - 1) * (n + 2) // 2), Output(((0, "A"),), axes, n * (n - 1) // 2))
        return (Output(()), *kinds) if n > 1 else (Output(()),)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(..., n, n) -> (...), (..., n, n), (..., n, n)"""
        trace = x.diagonal(dim1=-2, dim2=-1).sum(-1) / math.sqrt(self.size)
        if self.size == 1:
            return [trace]
        return [trace, 0.5 * (x + x.mT) - self._scalar(trace), 0.5 * (x - x.mT)]

    def inverse(self, parts: list[Tensor]) -> Tensor:
        """The sum."""
        scalar = self._scalar(parts[0])
        return scalar + parts[1] + parts[2] if self.size > 1 else scalar

    def spread(self, parts: list[Tensor]) -> Tensor:
        """t_1 / n + t_S (1 - 1/n) on the diagonal, (t_S + t_A) / 2 off it."""
        n = self.size
        if n == 1:
            return parts[0][..., None, None]
        trace, symmetric, antisymmetric = parts
        on = trace / n + symmetric * ((n - 1) / n)
        eye = torch.eye(n, dtype=on.dtype, device=on.device)
        return _everywhere(0.5 * (symmetric + antisymmetric), n, ()) + on[..., None, None] * eye

    def _scalar(self, trace: Tensor) -> Tensor:
        eye = torch.eye(self.size, dtype=trace.dtype, device=trace.device)
        return (trace / math.sqrt(self.size))[..., None, None] * eye
