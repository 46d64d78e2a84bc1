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

import torch
from torch import Tensor

from manifolds.frame import PairFrame
from manifolds.linalg import split
from symgeo.chart import Chart, Pieces, flattened, shaped


@dataclass(frozen=True)
class Completion:
    """An orthonormal matrix ``Q (B, n, h)`` completed to a square one, as Householder reflections.

    The completed matrix starts with ``Q`` up to the unit numbers ``phase (B, h)``.
    """

    reflections: Tensor
    tau: Tensor
    phase: Tensor

    @classmethod
    def of(cls, q: Tensor) -> Completion:
        """From orthonormal columns."""
        reflections, tau = torch.geqrf(q)
        return cls(reflections, tau, reflections.diagonal(dim1=-2, dim2=-1).sgn())

    def apply(self, z: Tensor, adjoint: bool) -> Tensor:
        """The unitary matrix, or its adjoint, on ``z (k, B, n, h)``."""
        wide = z.permute(1, 2, 0, 3).flatten(-2).contiguous()
        moved = torch.ormqr(self.reflections, self.tau, wide, left=True, transpose=adjoint)
        return moved.unflatten(-1, (z.shape[0], z.shape[-1])).permute(2, 0, 1, 3)

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


class HorizontalBasis:
    """An isometry from flat vectors onto the horizontal coordinates of a chart, and its adjoint.

    ``d - h^2`` coordinates per full-rank pair; with ``horizontal=False`` the vertical ones are kept too.  Parameters
    that are exactly zero (which have no adaptive metric) and frozen ones have none.
    """

    def __init__(self, chart: Chart, horizontal: bool = True):
        self.chart = chart
        self.kept = chart.rest.nonzero().squeeze(1) if chart.zeros else None
        frames = chart.frames if horizontal else {}
        self.pairs = [ProjectedPairs(f) if f.relaxed else PairBasis(f) for f in frames.values()]
        rest = chart.sizes[0] if self.kept is None else self.kept.numel()
        self.sizes = [rest, *(pair.size for pair in self.pairs)]
        self.plain = [] if horizontal else chart.sizes[1:]
        self.size = sum(self.sizes) + sum(self.plain)

    def expand(self, flat: Tensor) -> Pieces:
        """Columns ``(size, k)`` -> the pieces of coordinates of the chart, with ``k`` rows."""
        rest, *pieces = flat.T.split(self.sizes + self.plain, dim=1)
        if self.kept is not None:
            rest = rest.new_zeros(rest.shape[0], self.chart.sizes[0]).index_copy(1, self.kept, rest)
        frames = self.chart.frames
        if self.pairs:
            full = [basis.expand(piece) for basis, piece in zip(self.pairs, pieces)]
        else:
            full = [shaped(piece, f.point.shape, f.point.is_complex()) for f, piece in zip(frames.values(), pieces)]
        return rest, dict(zip(frames, full))

    def contract(self, z: Pieces) -> Tensor:
        """The adjoint: pieces with ``k`` rows -> ``(size, k)``."""
        rest, pairs = z
        if self.kept is not None:
            rest = rest.index_select(1, self.kept)
        bases = zip(self.pairs, pairs.values())
        flat = [basis.contract(pair) for basis, pair in bases] if self.pairs else map(flattened, pairs.values())
        return torch.cat([rest, *flat], dim=1).T
