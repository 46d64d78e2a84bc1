"""Alignment of factor pairs over GL(h): the point of an orbit closest to a given pair (derived here).

Not recorded by autograd; everything happens in the balanced gauge of a :class:`manifolds.frame.PairFrame`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manifolds.frame import PairFrame, split
from manifolds.linalg import balance, expm, gram, polar, sylvester

_TURN = 0.5  # largest Frobenius norm of the exponent of one step


def align(frame: PairFrame, y: Tensor, iterations: int = 30) -> Tensor:
    """The point of the orbit of ``y`` closest to ``frame.point`` in the metric frozen there.

    Minimises ``|(G A^-1 - G_0) w^(1/2)|^2 + |(H A^H - H_0) w^(1/2)|^2`` over A in GL(h) by Gauss-Newton with
    multiplicative steps ``A <- expm(t L) A``: with ``S = [G; H] w^(-1/2)`` and the residual ``R``

        (S_G^H S_G) X + X (S_H^H S_H) = S_G^H R_G w^(1/2) - w^(1/2) R_H^H S_H,     X = w^(1/2) L w^(1/2).
    """
    rows, root = frame.rows, frame.root
    weight = root.mT * root
    step = torch.ones_like(frame.deficient, dtype=root.dtype)
    residual = (y - frame.point) * root
    for _ in range(iterations):
        (s_g, s_h), (r_g, r_h) = split(y / root, rows), split(residual, rows)
        x = sylvester(gram(s_g), gram(s_h), s_g.mH @ r_g - r_h.mH @ s_h)
        turn = x / weight
        last = bool((norm(turn) <= 1e-7).all())  # what is left after it is its square
        turn = turn * column(step * (_TURN / norm(turn).clamp_min(_TURN)))
        proposal = _turned(y, turn, rows)
        moved = (proposal - frame.point) * root
        better = norm(moved) < norm(residual)
        y = torch.where(column(better), proposal, y)
        residual = torch.where(column(better), moved, residual)
        step = torch.where(better, (2 * step).clamp_max(1.0), 0.5 * step)
        if last:
            break
    return y


def _turned(y: Tensor, turn: Tensor, rows: int) -> Tensor:
    g, h = split(y, rows)
    return torch.cat([g @ expm(-turn, _TURN), h @ expm(turn, _TURN).mH], dim=-2)


def first_alignment(base: PairFrame, y: Tensor) -> Tensor:
    """Balances ``y``, turns it by the closest unitary matrix, then aligns it; in the gauge of ``base``."""
    g, h = split(y, base.rows)
    own = balance(g, h)
    balanced = torch.cat([g @ own.inverse, h @ own.gauge.mH], dim=-2)
    return align(base, balanced @ polar(balanced.mH @ (base.point * base.root**2)))


def to_gauge(frame: PairFrame, y: Tensor) -> Tensor:
    """``y`` carried into the gauge of ``frame``."""
    g, h = split(y, frame.rows)
    return torch.cat([g @ frame.inverse, h @ frame.gauge.mH], dim=-2)


def norm(z: Tensor) -> Tensor:
    """The Frobenius norm of each matrix of the batch."""
    return torch.linalg.vector_norm(z, dim=(-2, -1))


def column(x: Tensor) -> Tensor:
    """One number per matrix, ready to be multiplied with the matrices."""
    return x[..., None, None]
