"""Transforms of axes that a permutation moves: one axis, and the two axes of a square tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from symgeo.curvature.transform import OutAxis, Output


def centre(x: Tensor) -> Tensor:
    """x minus its mean along the last axis, in two passes: the second removes the rounding error of the first."""
    x = x - x.mean(-1, keepdim=True)
    return x - x.mean(-1, keepdim=True)


def off_diagonal(x: Tensor) -> Tensor:
    """x (..., n, n) without its diagonal."""
    return x - torch.diag_embed(x.diagonal(dim1=-2, dim2=-1))


@dataclass(frozen=True)
class Centre:
    """S_n on one axis: the trivial part s / sqrt(n), s the sum, and the centred part W of dimension n - 1."""

    size: int

    exact = False

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The scaled sum and, for n > 1, the centred vector."""
        centred = Output(((0, "W"),), (OutAxis("coordinate", self.size),), self.size - 1)
        return (Output(()), centred) if self.size > 1 else (Output(()),)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(..., n) -> (...), (..., n)"""
        total = x.sum(-1) / math.sqrt(self.size)
        return [total, centre(x)] if self.size > 1 else [total]

    def inverse(self, parts: list[Tensor]) -> Tensor:
        """The sum of both parts."""
        constant = (parts[0] / math.sqrt(self.size)).unsqueeze(-1)
        return constant + parts[1] if self.size > 1 else constant

    def spread(self, parts: list[Tensor]) -> Tensor:
        """t_1 / n + t_W (n - 1) / n"""
        t = parts[0] / self.size
        if self.size > 1:
            t = t + parts[1] * ((self.size - 1) / self.size)
        return t.unsqueeze(-1).expand(*t.shape, self.size)


@dataclass(frozen=True)
class Split:
    """S_n on the two axes of (..., n, n, *cells): the diagonal cells, and the tensor without them.

    Neither is irreducible: both go on to other transforms.
    """

    size: int
    cells: tuple[int, ...]

    exact = True

    @property
    def outputs(self) -> tuple[Output, ...]:
        """(..., *cells, n) and, for n > 1, (..., n, n, *cells)."""
        cells = tuple(OutAxis("open", size, slot=2 + i) for i, size in enumerate(self.cells))
        rows, columns = (OutAxis("open", self.size, slot=i) for i in (0, 1))
        diagonal, off = Output((), (*cells, rows)), Output((), (rows, columns, *cells))
        return (diagonal, off) if self.size > 1 else (diagonal,)

    def _move(self, x: Tensor, back: bool = False) -> Tensor:
        """(..., n, n, *cells) -> (..., *cells, n, n), or back."""
        k = len(self.cells)
        here, there = (-2 - k, -1 - k), (-2, -1)
        return x.movedim(there, here) if back else x.movedim(here, there)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The diagonal moves last."""
        moved = self._move(x)
        diagonal = moved.diagonal(dim1=-2, dim2=-1)
        return [diagonal, self._move(off_diagonal(moved), back=True)] if self.size > 1 else [diagonal]

    def inverse(self, parts: list[Tensor]) -> Tensor:
        """Both put together."""
        whole = self._move(torch.diag_embed(parts[0]), back=True)
        return whole + parts[1] if self.size > 1 else whole

    def spread(self, parts: list[Tensor]) -> Tensor:
        """Both put together."""
        return self.inverse(parts)


@dataclass(frozen=True)
class OffDiagonal:
    """S_n on the off-diagonal entries y_ij, i != j, n > 1, with row sums r and column sums c:

        1: sum / sqrt(n (n - 1));  W: centre(r + c) / sqrt(2 (n - 2)) (n > 2) and (r - c) / sqrt(2 n);
        S, A: the symmetric and the antisymmetric rest, of dimensions n (n - 3) / 2 and (n - 1) (n - 2) / 2.

    The copies of W are adapted to transposition, which makes them orthogonal to each other (derived here).
    """

    size: int

    exact = False

    @property
    def outputs(self) -> tuple[Output, ...]:
        """1, W with its two copies (one for n = 2), A for n > 2, S for n > 3."""
        n = self.size
        pair = (OutAxis("coordinate", n), OutAxis("coordinate", n, place=1))
        kinds = [
            Output(()),
            Output(((0, "W"),), (OutAxis("copy", 2 if n > 2 else 1), OutAxis("coordinate", n)), n - 1),
        ]
        if n > 2:
            kinds.append(Output(((0, "A"),), pair, (n - 1) * (n - 2) // 2))
        if n > 3:
            kinds.append(Output(((0, "S"),), pair, n * (n - 3) // 2))
        return tuple(kinds)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(..., n, n) -> (...), (..., 2, n), (..., n, n), (..., n, n)"""
        n = self.size
        rows, columns = x.sum(-1), x.sum(-2)
        total = rows.sum(-1) / math.sqrt(n * (n - 1))
        minus = centre(rows - columns) / math.sqrt(2 * n)
        if n == 2:
            return [total, minus.unsqueeze(-2)]
        plus = centre(rows + columns) / math.sqrt(2 * (n - 2))
        parts = [total, torch.stack([plus, minus], dim=-2), 0.5 * (x - x.mT) - self._antisymmetric(minus)]
        return parts if n == 3 else [*parts, 0.5 * (x + x.mT) - self._symmetric(total, plus)]

    def inverse(self, parts: list[Tensor]) -> Tensor:
        """The sum of the parts."""
        minus = parts[1][..., -1, :]
        y = self._antisymmetric(minus)
        if self.size == 2:
            constant = parts[0][..., None, None].expand(*parts[0].shape, 2, 2)
            return y + off_diagonal(constant / math.sqrt(2))
        return y + self._symmetric(parts[0], parts[1][..., 0, :]) + sum(parts[2:])

    def spread(self, parts: list[Tensor]) -> Tensor:
        """The multiplicity of each copy over the n (n - 1) entries."""
        n = self.size
        t = parts[0] / (n * (n - 1)) + parts[1].sum(-1) / n
        for part, output in zip(parts[2:], self.outputs[2:]):
            t = t + part * (output.dimension / (n * (n - 1)))
        return off_diagonal(t[..., None, None].expand(*t.shape, n, n))

    def _symmetric(self, total: Tensor, plus: Tensor) -> Tensor:
        n = self.size
        y = (plus.unsqueeze(-1) + plus.unsqueeze(-2)) / math.sqrt(2 * (n - 2))
        return off_diagonal(y + (total / math.sqrt(n * (n - 1)))[..., None, None])

    def _antisymmetric(self, minus: Tensor) -> Tensor:
        return (minus.unsqueeze(-1) - minus.unsqueeze(-2)) / math.sqrt(2 * self.size)
