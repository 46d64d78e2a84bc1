"""An orthonormal basis of the horizontal space, matrix-free.

In the balanced gauge both factors of a pair are ``point = Q diag(s) w^(1/2)`` with orthonormal ``Q_G``, ``Q_H`` and one
vector ``s``.  Coordinates split as ``z_G = Q_G a + Q_G' a'``, ``z_H = Q_H b + Q_H' b'`` with ``Q'`` an orthonormal
completion, and horizontal means ``conj(b_ji) s_j = s_i a_ij``: with ``r_ij = (s_i^2 + s_j^2)^(1/2)``

    a_ij = s_j c_ij / r_ij,    conj(b_ji) = s_i c_ij / r_ij

for one ``h x h`` matrix ``c``, so that ``(c, a', b')`` are orthonormal coordinates, ``h^2`` fewer than ``z`` has
(derived here).  ``Q'`` is a product of Householder reflections and never formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from manifolds.frame import PairFrame
from manifolds.linalg import gram, split
from symgeo.chart import Chart, Pieces, flattened, shaped

_RUNS = 4096  # of zeros and others, that are copied as slices


@dataclass(frozen=True)
class Completion:
    """An orthonormal matrix ``Q (B, n, h)`` completed to a square one, as a product of Householder reflections.

    In compact form ``I - Y T Y^H`` (Schreiber and Van Loan 1989), ``T^-1 = diag(1 / tau) + triu(Y^H Y, 1)``, which is
    applied by products of matrices.  It starts with ``Q`` up to the unit numbers ``phase (B, h)``.
    """

    reflections: Tensor
    core: Tensor
    phase: Tensor

    @classmethod
    def of(cls, q: Tensor) -> Completion:
        """From orthonormal columns."""
        triangle, tau = torch.geqrf(q)
        size, idle = q.shape[-1], tau == 0  # reflections that are the identity
        eye = torch.eye(*q.shape[-2:], dtype=q.dtype, device=q.device)
        y = torch.where(idle.unsqueeze(-2), 0.0, triangle.tril(-1) + eye)
        inverse = gram(y).triu(1) + torch.diag_embed(torch.where(idle, 1.0, tau).reciprocal())
        core = torch.linalg.solve_triangular(inverse, eye[:size].expand_as(inverse), upper=True)
        return cls(y, core, triangle.diagonal(dim1=-2, dim2=-1).sgn())

    def apply(self, z: Tensor, adjoint: bool) -> Tensor:
        """The unitary matrix, or its adjoint, on ``z (k, B, n, h)``."""
        core = self.core.mH if adjoint else self.core
        return z - self.reflections @ (core @ (self.reflections.mH @ z))

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``(a, a')`` of ``z = Q a + Q' a'``."""
        moved, size = self.apply(z, adjoint=True), self.phase.shape[-1]
        return self.phase.conj().unsqueeze(-1) * moved[..., :size, :], moved[..., size:, :]

    def join(self, a: Tensor, rest: Tensor) -> Tensor:
        """``Q a + Q' a'``."""
        return self.apply(torch.cat([self.phase.unsqueeze(-1) * a, rest], dim=-2), adjoint=False)


class PairBasis:
    """Orthonormal horizontal coordinates ``(k, size)`` of one batch of full-rank pairs."""

    def __init__(self, frame: PairFrame):
        self.rows, (self.batch, total, self.h) = frame.rows, frame.point.shape
        self.total, self.complex = total, frame.point.is_complex()
        norms = frame.spectrum.sqrt() / frame.root.squeeze(-2)
        q = frame.scaled / norms.unsqueeze(-2)
        self.left, self.right = (Completion.of(side) for side in split(q, self.rows))
        radius = (norms.square().unsqueeze(-1) + norms.square().unsqueeze(-2)).sqrt()
        self.column = norms.unsqueeze(-2) / radius  # s_j / r_ij
        self.row = norms.unsqueeze(-1) / radius
        self.size = self.batch * self.h * (total - self.h) * (2 if self.complex else 1)

    def contract(self, z: Tensor) -> Tensor:
        """The coordinates of ``z (k, B, n + m, h)``; its vertical part is lost."""
        (a, a_rest), (b, b_rest) = self.left.split(z[..., :self.rows, :]), self.right.split(z[..., self.rows:, :])
        c = self.column * a + self.row * b.mH
        return flattened(torch.cat([c, a_rest, b_rest], dim=-2))

    def expand(self, flat: Tensor) -> Tensor:
        """The horizontal ``z (k, B, n + m, h)`` with coordinates ``(k, size)``."""
        blocks = shaped(flat, (self.batch, self.total - self.h, self.h), self.complex)
        c, a_rest, b_rest = blocks.split([self.h, self.rows - self.h, self.total - self.rows - self.h], dim=-2)
        sides = self.left.join(self.column * c, a_rest), self.right.join((self.row * c).mH, b_rest)
        return torch.cat(sides, dim=-2)


class ProjectedPairs:
    """The same for batches with pairs that lack full rank: all coordinates, projected; vertical ones stay zero."""

    def __init__(self, frame: PairFrame):
        self.frame, self.complex = frame, frame.point.is_complex()
        self.size = frame.point.numel() * (2 if self.complex else 1)

    def contract(self, z: Tensor) -> Tensor:
        """The projection of ``z (k, B, n + m, h)``, flattened."""
        return flattened(self.frame.project(z))

    def expand(self, flat: Tensor) -> Tensor:
        """The projection of flat coordinates."""
        return self.frame.project(shaped(flat, self.frame.point.shape, self.complex))


class Kept:
    """The entries of a vector that are not zero, taken from rows ``(k, d)`` and put back among zeros.

    Zeros mostly come in blocks (a padding row, biases that never moved), so that both are a few copies of slices;
    scattered ones are found by their positions.
    """

    def __init__(self, vector: Tensor):
        mask = vector != 0
        bounds = (mask[1:] != mask[:-1]).nonzero().squeeze(1) + 1
        self.total, self.size = vector.numel(), int(mask.sum())
        self.positions = mask.nonzero().squeeze(1) if bounds.numel() > _RUNS else None
        ends = [0, *(bounds.tolist() if self.positions is None else ()), self.total]
        self.runs = [b - a for a, b in pairwise(ends)]
        self.first = 0 if self.total and bool(mask[0]) else 1

    def take(self, rows: Tensor) -> list[Tensor]:
        """The entries, in pieces along the last axis."""
        if self.positions is not None:
            return [rows.index_select(1, self.positions)]
        return list(rows.split(self.runs, dim=1)[self.first::2])

    def put(self, rows: Tensor) -> Tensor:
        """The rows ``(k, d)`` with these entries."""
        if self.positions is not None:
            return rows.new_zeros(rows.shape[0], self.total).index_copy_(1, self.positions, rows)
        pieces, kept = [rows.new_zeros(rows.shape[0], n) for n in self.runs], self.runs[self.first::2]
        pieces[self.first::2] = rows.split(kept, dim=1) if kept else ()
        return torch.cat(pieces, dim=1)


class HorizontalBasis:
    """An isometry from flat vectors onto the horizontal coordinates of a chart, and its adjoint.

    ``d - h^2`` coordinates per full-rank pair; with ``horizontal=False`` the vertical ones are kept too.  Parameters
    that are exactly zero (which have no adaptive metric) and frozen ones have none.
    """

    def __init__(self, chart: Chart, horizontal: bool = True):
        self.chart = chart
        self.kept = Kept(chart.rest) if chart.zeros else None
        frames = chart.frames if horizontal else {}
        self.pairs = [ProjectedPairs(f) if f.relaxed else PairBasis(f) for f in frames.values()]
        rest = chart.sizes[0] if self.kept is None else self.kept.size
        self.sizes = [rest, *(pair.size for pair in self.pairs)]
        self.plain = [] if horizontal else chart.sizes[1:]
        self.size = sum(self.sizes) + sum(self.plain)

    def expand(self, flat: Tensor) -> Pieces:
        """Columns ``(size, k)`` -> the pieces of coordinates of the chart, with ``k`` rows."""
        rest, *pieces = flat.T.split(self.sizes + self.plain, dim=1)
        frames = self.chart.frames
        if self.pairs:
            full = [basis.expand(piece) for basis, piece in zip(self.pairs, pieces)]
        else:
            full = [shaped(piece, f.point.shape, f.point.is_complex()) for f, piece in zip(frames.values(), pieces)]
        return rest if self.kept is None else self.kept.put(rest), dict(zip(frames, full))

    def contract(self, z: Pieces) -> Tensor:
        """The adjoint: pieces with ``k`` rows -> ``(size, k)``."""
        rest, pairs = z
        bases = zip(self.pairs, pairs.values())
        flat = [basis.contract(pair) for basis, pair in bases] if self.pairs else map(flattened, pairs.values())
        return torch.cat([*([rest] if self.kept is None else self.kept.take(rest)), *flat], dim=1).T
