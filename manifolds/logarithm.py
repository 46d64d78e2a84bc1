"""The logarithm of the quotient by GL(h): alignment over the group, and shooting (derived here).

The search is not recorded by autograd.  It works on objects that have the interface of
:class:`manifolds.frame.PairFrame`, in their balanced gauge, where both metrics are one weight per column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from manifolds.alignment import align, column, first_alignment, norm, to_gauge
from manifolds.frame import PairFrame, split
from manifolds.linalg import eigh, gram

_STUCK = 2.0**-12  # a step halved below this makes no progress
_FAR = 1e6  # an endpoint this many times larger than both points is taken to have left the domain
_PATIENCE = 16  # iterations in which the miss has to halve


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
    and with the step halved where the miss would grow.  Stops at a miss of ``tol |u|``, or where the miss no
    longer halves in 16 iterations.  ``converged`` means a miss below ``1e-9 |u|`` (or rounding); that is the
    shortest geodesic when ``y`` lies inside the injectivity radius.  Points that no geodesic joins, or without
    full rank, come back with ``converged`` False.

    >>> from manifolds.factored import FactorPair
    >>> x, y = (torch.tensor([[p], [1.0]], dtype=torch.float64) for p in (2.0, 6.0))
    >>> result = log_factor_pair(FactorPair(1, "mix"), x, y)
    >>> result.converged.item(), round((result.vector[0] + 2 * result.vector[1]).item(), 6)
    (True, 4.0)
    """
    x, y = torch.broadcast_tensors(x, y)
    base = manifold.frame(x)
    target = first_alignment(base, y)
    hit = _hit(manifold, base, base.project((target - base.point) * base.root), target)
    scale, history = norm(base.point * base.root), AndersonHistory()
    step, iterations = torch.ones_like(scale), 0
    milestone, stale = hit.miss, torch.zeros_like(scale)
    while iterations < max_iter:
        active = (hit.miss > tol * norm(hit.z) + 1e-15 * scale) & (step > _STUCK) & (stale < _PATIENCE)
        if not bool(active.any()):
            break
        iterations += 1
        plain = column(step) * hit.residual
        move = torch.where(column(step == 1.0), history.accelerate(hit.z, hit.residual), plain)
        landed = _hit(manifold, base, torch.where(column(active), hit.z + move, hit.z), hit.target)
        better = active & (landed.miss < hit.miss)
        hit = hit.update(better, landed)
        step = torch.where(better, (2 * step).clamp_max(1.0), torch.where(active, 0.5 * step, step))
        halved = hit.miss <= 0.5 * milestone
        milestone, stale = torch.where(halved, hit.miss, milestone), torch.where(halved, 0.0, stale + 1.0)
    converged = (hit.miss <= 1e-9 * norm(hit.z) + 1e-12 * scale) & ~base.deficient
    return PairLog(base.tangent(hit.z), converged, hit.miss, iterations)


class _Hit(NamedTuple):
    """A velocity (in coordinates at x), its horizontal residual, the miss, and the aligned target."""

    z: Tensor
    residual: Tensor
    miss: Tensor
    target: Tensor

    def update(self, mask: Tensor, other: _Hit) -> _Hit:
        wide = column(mask)
        return _Hit(*(torch.where(mask if a.ndim == mask.ndim else wide, b, a) for a, b in zip(self, other)))


def _hit(manifold: PairManifold, base: PairFrame, z: Tensor, target: Tensor) -> _Hit:
    """Integrates the geodesic with coordinates ``z`` and aligns ``target`` (all in the gauge of ``base``).

    The residual is measured in the symmetric orthonormal frame ``P^(1/2)`` of the metric at the endpoint,
    ``<u, u> = Tr(P u^H u)`` for either side, and then made horizontal at ``x``.
    """
    end = _endpoint(manifold, base, z)
    lost = ~(norm(end) <= _FAR * (norm(base.point) + norm(target)))
    end = torch.where(column(lost), base.point, end)
    at_end = manifold.frame(end)
    aligned = align(at_end, to_gauge(at_end, target), 6)
    miss = norm((aligned - at_end.point) * at_end.root)
    target = at_end.restore(aligned)
    (d_g, d_h), (g, h) = split(target - end, base.rows), split(end, base.rows)
    grams, exponent = ((g, h), -0.5) if base.metric == "inv" else ((h, g), 0.5)
    roots = [_power(gram(a), exponent) for a in grams]
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


class AndersonHistory:
    """Anderson acceleration: the step that cancels the residual in the span of the last differences."""

    def __init__(self, memory: int = 12) -> None:
        self.memory = memory
        self.points: list[Tensor] = []
        self.residuals: list[Tensor] = []

    def accelerate(self, z: Tensor, residual: Tensor) -> Tensor:
        """``r - (dZ + dR) c`` with ``c = argmin |r - dR c|`` over the differences to earlier iterates.

        The coefficients are real: horizontal spaces are real subspaces, for complex pairs too.
        """
        move = residual
        if self.points:
            d_z = torch.stack([_flat(p - z) for p in self.points], dim=-1)  # (..., reals, k)
            d_r = torch.stack([_flat(r - residual) for r in self.residuals], dim=-1)
            size = torch.linalg.vector_norm(d_r, dim=-2, keepdim=True)
            scale = torch.where(size > 0, 1 / size, 0.0)
            normal = gram(d_r * scale) + 1e-10 * torch.eye(size.shape[-1], dtype=size.dtype, device=size.device)
            c = torch.linalg.solve(normal, (d_r * scale).mT @ _flat(residual).unsqueeze(-1))
            move = residual - _shaped((((d_z + d_r) * scale) @ c).squeeze(-1), z)
        self.points = [*self.points, z][-self.memory :]
        self.residuals = [*self.residuals, residual][-self.memory :]
        return move


def _flat(z: Tensor) -> Tensor:
    return torch.view_as_real(z).flatten(-3) if z.is_complex() else z.flatten(-2)


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    shape = like.shape[-2:]
    return torch.view_as_complex(flat.unflatten(-1, (*shape, 2))) if like.is_complex() else flat.unflatten(-1, shape)
