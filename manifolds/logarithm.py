"""The logarithm of the quotient by GL(h): alignment over the group, and shooting (derived here).

The search is not recorded by autograd.  It works on objects that have the interface of
:class:`manifolds.frame.PairFrame`, in their balanced gauge, where both metrics are one weight per column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from manifolds.frame import PairFrame, split
from manifolds.linalg import balance, eigh, expm, gram, polar, sylvester

_STUCK = 2.0**-12  # a step halved below this makes no progress
_FAR = 1e6  # an endpoint this many times larger than both points is taken to have left the domain
_TURN = 0.5  # largest Frobenius norm of the exponent of one alignment step


class PairManifold(Protocol):
    """What the search needs to know about a manifold of pairs."""

    rows: int
    eps: float

    def frame(self, x: Tensor) -> PairFrame:
        """The balanced frame at ``x``."""

    def geodesic(self, x: Tensor, u: Tensor, method: str = "exact") -> Callable[[float], Tensor]:
        """The geodesic from ``x`` with velocity ``u``."""


class PairLog(NamedTuple):
    """Result of :func:`log_factor_pair`.

    vector : ``(..., n + m, h)``, horizontal at x;  converged : ``(...)`` bool;  miss : ``(...)``, the distance
    (in the metric at its endpoint) by which the geodesic still misses the orbit of y;  iterations : int.
    """

    vector: Tensor
    converged: Tensor
    miss: Tensor
    iterations: int


@torch.no_grad()
def log_factor_pair(
    manifold: PairManifold, x: Tensor, y: Tensor, tol: float = 1e-12, max_iter: int = 100
) -> PairLog:
    """The horizontal ``u`` at ``x`` whose geodesic ends in the orbit of ``y``, for pairs ``(..., n + m, h)``.

    Starts at the horizontal part of the aligned chord; then integrates the geodesic, aligns ``y`` to its
    endpoint over GL(h), and adds the horizontal part of what is missing: accelerated by Anderson's method,
    and with the step halved where the miss would grow.  Stops at a miss of ``tol |u|``.  ``converged`` means
    a miss below ``1e-9 |u|`` (or rounding); that is the shortest geodesic when ``y`` lies inside the
    injectivity radius.  Points that no geodesic joins, or without full rank, come back with ``converged``
    False.
    """
    x, y = torch.broadcast_tensors(x, y)
    base = manifold.frame(x)
    target = _first_alignment(base, y)
    hit = _hit(manifold, base, base.project((target - base.point) * base.root), target)
    scale, history = _norm(base.point * base.root), _History()
    step, iterations = torch.ones_like(scale), 0
    while iterations < max_iter:
        active = (hit.miss > tol * _norm(hit.z) + 1e-15 * scale) & (step > _STUCK)
        if not bool(active.any()):
            break
        iterations += 1
        plain = _column(step) * hit.residual
        move = torch.where(_column(step == 1.0), history.accelerate(hit.z, hit.residual), plain)
        landed = _hit(manifold, base, torch.where(_column(active), hit.z + move, hit.z), hit.target)
        better = active & (landed.miss < hit.miss)
        hit = hit.update(better, landed)
        step = torch.where(better, (2 * step).clamp_max(1.0), torch.where(active, 0.5 * step, step))
    converged = (hit.miss <= 1e-9 * _norm(hit.z) + 1e-12 * scale) & ~base.deficient
    return PairLog(base.tangent(hit.z), converged, hit.miss, iterations)


class _Hit(NamedTuple):
    """A velocity (in coordinates at x), its horizontal residual, the miss, and the aligned target."""

    z: Tensor
    residual: Tensor
    miss: Tensor
    target: Tensor

    def update(self, mask: Tensor, other: _Hit) -> _Hit:
        wide = _column(mask)
        return _Hit(*(torch.where(mask if a.ndim == mask.ndim else wide, b, a) for a, b in zip(self, other)))


def _hit(manifold: PairManifold, base: PairFrame, z: Tensor, target: Tensor) -> _Hit:
    """Integrates the geodesic with coordinates ``z`` and aligns ``target`` (all in the gauge of ``base``).

    The residual is measured in the symmetric orthonormal frame ``P^(1/2)`` of the metric at the endpoint,
    ``<u, u> = Tr(P u^H u)`` for either side, and then made horizontal at ``x``.
    """
    end = _endpoint(manifold, base, z)
    lost = ~(_norm(end) <= _FAR * (_norm(base.point) + _norm(target)))
    end = torch.where(_column(lost), base.point, end)
    at_end = manifold.frame(end)
    aligned = align(at_end, _to_gauge(at_end, target), 6)
    miss = _norm((aligned - at_end.point) * at_end.root)
    target = at_end.restore(aligned)
    (d_g, d_h), (g, h) = split(target - end, base.rows), split(end, base.rows)
    roots = (_power(gram(g), -0.5), _power(gram(h), -0.5)) if base.metric == "inv" else (
        _power(gram(h), 0.5), _power(gram(g), 0.5)
    )  # fmt: skip
    residual = torch.cat([d_g @ roots[0], d_h @ roots[1]], dim=-2)
    return _Hit(z, base.project(residual), torch.where(lost | at_end.deficient, torch.inf, miss), target)


def _power(a: Tensor, exponent: float) -> Tensor:
    values, vectors = eigh(a)
    tiny = torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
    return (vectors * values.clamp_min(tiny).pow(exponent).unsqueeze(-2)) @ vectors.mH


def _endpoint(manifold: PairManifold, base: PairFrame, z: Tensor) -> Tensor:
    """The end of the geodesic, NaN where it leaves the domain."""
    if not manifold.eps:
        return base.curve(z, 1.0, "exact")
    try:
        return manifold.geodesic(base.point, z / base.root)(1.0)
    except ValueError:
        return torch.full_like(base.point, torch.nan)


class _History:
    """Anderson acceleration: the step that cancels the residual in the span of the last differences."""

    def __init__(self, memory: int = 12) -> None:
        self.memory = memory
        self.points: list[Tensor] = []
        self.residuals: list[Tensor] = []

    def accelerate(self, z: Tensor, residual: Tensor) -> Tensor:
        """``r - (dZ + dR) c`` with ``c = argmin |r - dR c|`` over the differences to earlier iterates."""
        move = residual
        if self.points:
            d_z = torch.stack([(p - z).flatten(-2) for p in self.points], dim=-1)  # (..., (n + m) h, k)
            d_r = torch.stack([(r - residual).flatten(-2) for r in self.residuals], dim=-1)
            size = torch.linalg.vector_norm(d_r, dim=-2, keepdim=True)
            scale = torch.where(size > 0, 1 / size, 0.0)
            normal = gram(d_r * scale) + 1e-10 * torch.eye(size.shape[-1], dtype=size.dtype, device=size.device)
            c = torch.linalg.solve(normal, (d_r * scale).mH @ residual.flatten(-2).unsqueeze(-1))
            move = residual - (((d_z + d_r) * scale) @ c).squeeze(-1).unflatten(-1, z.shape[-2:])
        self.points = [*self.points, z][-self.memory :]
        self.residuals = [*self.residuals, residual][-self.memory :]
        return move


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
        if bool((_norm(turn) <= 1e-15).all()):
            break
        turn = turn * _column(step * (_TURN / _norm(turn).clamp_min(_TURN)))
        proposal = _turned(y, turn, rows)
        moved = (proposal - frame.point) * root
        better = _norm(moved) < _norm(residual)
        y = torch.where(_column(better), proposal, y)
        residual = torch.where(_column(better), moved, residual)
        step = torch.where(better, (2 * step).clamp_max(1.0), 0.5 * step)
    return y


def _turned(y: Tensor, turn: Tensor, rows: int) -> Tensor:
    g, h = split(y, rows)
    return torch.cat([g @ expm(-turn, _TURN), h @ expm(turn, _TURN).mH], dim=-2)


def _first_alignment(base: PairFrame, y: Tensor) -> Tensor:
    """Balances ``y``, turns it by the closest unitary matrix, then aligns it; in the gauge of ``base``."""
    g, h = split(y, base.rows)
    own = balance(g, h)
    balanced = torch.cat([g @ own.inverse, h @ own.gauge.mH], dim=-2)
    return align(base, balanced @ polar(balanced.mH @ (base.point * base.root**2)))


def _to_gauge(frame: PairFrame, y: Tensor) -> Tensor:
    g, h = split(y, frame.rows)
    return torch.cat([g @ frame.inverse, h @ frame.gauge.mH], dim=-2)


def _norm(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z, dim=(-2, -1))


def _column(x: Tensor) -> Tensor:
    return x[..., None, None]
