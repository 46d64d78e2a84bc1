"""The logarithm of the manifold of matrices of fixed rank, by shooting in core coordinates (derived here)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manifolds.embedded import EmbeddedFrame, Sides, pair_frame
from manifolds.logarithm import AndersonHistory as History

_STUCK = 2.0**-12  # a step cut below this makes no progress


class EmbeddedLog(NamedTuple):
    """Result of :func:`log_embedded`.

    vector : the horizontal ``(X, Y)`` in the balanced gauge of the frame;  converged : ``(...)`` bool;  miss :
    ``(...)``, the Frobenius distance by which the geodesic still misses the target;  iterations : int.
    """

    vector: Sides
    converged: Tensor
    miss: Tensor
    iterations: int


@torch.no_grad()
def log_embedded(base: EmbeddedFrame, target: EmbeddedFrame, tol: float = 1e-12, max_iter: int = 100) -> EmbeddedLog:
    """The velocity at ``base`` whose geodesic ends at the matrix of ``target``.

    Starts at ``P_T(Y - X)``, the inverse of the orthographic retraction, which is the logarithm to third order;
    then integrates the geodesic and adds ``P_T(Y - exp(xi))``: accelerated by Anderson's method, and with the
    step cut to a quarter where the miss would grow.  The geodesic stays in the column and row spaces of both
    matrices together, so all of it happens on matrices of size ``2r x 2r``.  Stops at a miss of ``tol |xi|``;
    ``converged`` means a miss below ``1e-9 |xi|`` (or rounding).  Matrices that no short geodesic joins, or with
    a smaller rank, come back with ``converged`` False.
    """
    regular = ~(base.deficient | target.deficient)
    spans = torch.linalg.qr(torch.cat([base.g, target.g], -1)).Q, torch.linalg.qr(torch.cat([base.h, target.h], -1)).Q
    core = _core(base, spans, regular)
    start = core.g @ core.h.mH
    end = torch.where(regular[..., None, None], (spans[0].mH @ target.g) @ (spans[1].mH @ target.h).mH, start)
    scale = _norm(start) + _norm(end)
    first = _tangent(core, end - start)
    hit = _Hit(torch.zeros_like(start), first, _norm(end - start)).update(_hit(core, first, end))
    step, iterations, history = torch.ones_like(scale), 0, History()
    while iterations < max_iter:
        active = (hit.miss > tol * _norm(hit.xi) + 1e-15 * scale) & (step > _STUCK)
        if not bool(active.any()):
            break
        iterations += 1
        wide, plain = active[..., None, None], step[..., None, None] * hit.residual
        move = torch.where((step == 1.0)[..., None, None], history.accelerate(hit.xi, hit.residual), plain)
        landed = _hit(core, torch.where(wide, hit.xi + move, hit.xi), end)
        better = active & (landed.miss < hit.miss)
        hit = hit.update(landed, better)
        step = torch.where(better, (2 * step).clamp_max(1.0), torch.where(active, 0.25 * step, step))
    converged = (hit.miss <= 1e-9 * _norm(hit.xi) + 1e-12 * scale) & regular
    x, y = core.lift(hit.xi @ core.h, hit.xi.mH @ core.g)  # zero where there was nothing to be found
    return EmbeddedLog((spans[0] @ x, spans[1] @ y), converged, hit.miss, iterations)


def _core(base: EmbeddedFrame, spans: Sides, regular: Tensor) -> EmbeddedFrame:
    """The frame in the coordinates of the spans; at some regular point where there is nothing to be found."""
    mask, eye = regular[..., None, None], torch.eye(base.g.shape[-1]).to(base.g)
    sides = [span.mH @ side for span, side in zip(spans, (base.g, base.h))]
    g, h = (torch.where(mask, side, torch.eye(*side.shape[-2:]).to(side)) for side in sides)
    return pair_frame(g, h, eye, eye, base.deficient)


class _Hit(NamedTuple):
    """A velocity, the tangent part of what its endpoint misses, and the size of the miss."""

    xi: Tensor
    residual: Tensor
    miss: Tensor

    def update(self, other: _Hit, mask: Tensor | None = None) -> _Hit:
        """The other one where it misses by less (or by the mask)."""
        better = other.miss < self.miss if mask is None else mask
        wide = better[..., None, None]
        return _Hit(*(torch.where(better if a.ndim == better.ndim else wide, b, a) for a, b in zip(self, other)))


def _hit(core: EmbeddedFrame, xi: Tensor, end: Tensor) -> _Hit:
    g, h = core.curve(core.lift(xi @ core.h, xi.mH @ core.g), 1.0)
    missing = end - g @ h.mH
    lost = ~torch.isfinite(missing.abs()).flatten(-2).all(-1)
    return _Hit(xi, _tangent(core, missing), torch.where(lost, torch.inf, _norm(missing)))


def _tangent(core: EmbeddedFrame, ambient: Tensor) -> Tensor:
    return core.push(core.lift(ambient @ core.h, ambient.mH @ core.g))


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1))
