"""Geodesics of full-rank pairs in the balanced gauge, and the integrator for those without a closed form.

Notation: ``G (..., n, h)``, ``H (..., m, h)`` with velocities ``X``, ``Y`` and Grams ``M = G^H G``,
``N = H^H H``.  All motion is a right multiplication by small matrices, so a curve that starts at ``(G, X)``
stays in the span of ``[X, G]`` and is stored as its ``2h x h`` coefficients: no QR of ``[G, X]`` is needed
(whose derivative does not exist at ``X = 0``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manifolds.linalg import expm, gram

METHODS = ("exact", "taylor2", "linear")
Field = Callable[[Tensor], Tensor]


def christoffel_inv(x: Tensor, u: Tensor, inverse_gram: Tensor) -> Tensor:
    """One side of Gamma(u, u) for ``Tr(M^-1 u^H u)``: ``G M^-1 X^H X - X M^-1 (X^H G + G^H X)``.

    Hide & Seek (arXiv 2505.05409), Eq. 11.
    """
    cross = u.mH @ x
    return x @ (inverse_gram @ gram(u)) - u @ (inverse_gram @ (cross + cross.mH))


def christoffel_mix(x: Tensor, u: Tensor, other: Tensor, other_u: Tensor, other_inverse: Tensor) -> Tensor:
    """One side of Gamma(u, u) for ``Tr(N X^H X) + Tr(M Y^H Y)``: ``(X (Y^H H + H^H Y) - G Y^H Y) N^-1``.

    Hide & Seek (arXiv 2505.05409), Eq. 12.
    """
    cross = other_u.mH @ other
    return (u @ (cross + cross.mH) - x @ gram(other_u)) @ other_inverse


def exact_inv(frame: Tensor, z: Tensor, t: float | Tensor, bound: float | None) -> Tensor:
    """The geodesic of the metric ``Tr(M^-1 X^H X)`` from a frame with orthonormal columns, in closed form.

    With ``K = z^H Q`` (derived here from the right-invariant metric of GL(n), of which ``R_*^{n x h}`` is a
    Riemannian quotient):

        Q(t) = [z, Q] expm(t [[K^H, I], [-z^H z, -K]])[:, h:] expm(t K).

    frame, z : ``(..., n, h)`` with ``frame^H frame = I``.  Complete for all t, any velocity, differentiable
    at ``z = 0``.  ``bound`` bounds ``|t z|`` and saves a read from the device.
    """
    if bound is None:
        bound = float(torch.linalg.matrix_norm((t * z).detach()).max()) if z.numel() else 0.0
    scale = max(bound, 1e-3)  # balances the blocks I and -z^H z, so that the exponent is as small as z
    k, size = t * (z.mH @ frame), z.shape[-1]
    eye = torch.eye(size, dtype=z.dtype, device=z.device).expand_as(k)
    top = torch.cat([k.mH, (t * scale) * eye], dim=-1)
    bottom = torch.cat([gram(z) * (-t / scale), -k], dim=-1)
    growth = expm(torch.cat([top, bottom], dim=-2), 2.5 * scale)[..., size:]
    coefficients = growth @ expm(k, bound)
    return (z @ coefficients[..., :size, :]) / scale + frame @ coefficients[..., size:, :]


def exact_mix(g: Tensor, h: Tensor, x: Tensor, y: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """The geodesic of ``Tr(N X^H X) + Tr(M Y^H Y)``, by adaptive Runge-Kutta on the coefficients.

    ``G'' = (G Y^H Y - X (Y^H H + H^H Y)) N^-1`` and likewise for ``H`` (Hide & Seek, Eq. 12).  The metric is
    geodesically incomplete: a pair whose Gram matrix becomes singular before ``t`` gets NaN.
    """
    size = g.shape[-1]
    gram_g, gram_h = gram(torch.cat([x, g], dim=-1)), gram(torch.cat([y, h], dim=-1))
    zero, eye = torch.zeros_like(gram_g[..., :size]), torch.eye(2 * size, dtype=g.dtype, device=g.device)
    velocity, position = zero + eye[:, :size], zero + eye[:, size:]
    start = torch.stack([position, position, velocity, velocity], dim=-3)  # (..., 4, 2h, h)

    def field(state: Tensor) -> Tensor:
        a, b, da, db = state.unbind(-3)
        n, m = b.mH @ gram_h @ b, a.mH @ gram_g @ a
        cross_n, cross_m = db.mH @ gram_h @ b, da.mH @ gram_g @ a
        dda = _right_solve(a @ (db.mH @ gram_h @ db) - da @ (cross_n + cross_n.mH), n)
        ddb = _right_solve(b @ (da.mH @ gram_g @ da) - db @ (cross_m + cross_m.mH), m)
        return torch.stack([da, db, dda, ddb], dim=-3)

    end = integrate(field, start, t)
    return torch.cat([x, g], dim=-1) @ end[..., 0, :, :], torch.cat([y, h], dim=-1) @ end[..., 1, :, :]


def _right_solve(a: Tensor, gram_matrix: Tensor) -> Tensor:
    """``a M^-1`` for Hermitian ``M`` (a singular one gives inf, which the integrator takes as leaving)."""
    solution, _ = torch.linalg.solve_ex(gram_matrix.mH, a.mH)
    return solution.mH


# Dormand & Prince 5(4)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_SMALLEST_STEP = 1e-5  # of the whole interval: below this a solution is taken to have left its domain


def integrate(field: Field, start: Tensor, t: float | Tensor, tolerance: float | None = None) -> Tensor:
    """The solution at time ``t`` of ``y' = field(y)``, ``y(0) = start``, with adaptive steps.

    Steps are common to the batch (all dimensions before the last three) and differentiable by plain autograd.
    Elements whose solution does not reach ``t`` (error still above tolerance at the smallest step) become NaN;
    the others are not affected by them.
    """
    if tolerance is None:
        tolerance = 1e-11 if torch.finfo(start.dtype).eps < 1e-10 else 1e-6
    y, done, step = start, 0.0, 0.25
    lost = torch.zeros(start.shape[:-3], dtype=torch.bool, device=start.device)
    slope = field(y)
    while done < 1.0:
        step = min(step, 1.0 - done)
        proposal, error, next_slope = _dormand_prince(field, y, slope, step * t)
        size = 1.0 + y.detach().abs().amax((-3, -2, -1))
        ratio = error.detach().abs().amax((-3, -2, -1)) / (tolerance * size)
        ratio = torch.where(lost, 0.0, torch.nan_to_num(ratio, nan=torch.inf))
        worst = float(ratio.max()) if ratio.numel() else 0.0
        if worst > 1.0 and step <= _SMALLEST_STEP:
            lost = lost | (ratio > 1.0)
            y, slope = _freeze(y, lost, start), _freeze(slope, lost, start)
            step = 0.25
            continue
        if worst <= 1.0:
            done += step
            y = torch.where(_expand(lost, y), y, proposal)
            slope = torch.where(_expand(lost, y), slope, next_slope)
        step = max(step * min(4.0, max(0.2, 0.9 * max(worst, 1e-10) ** -0.2)), _SMALLEST_STEP)
    return torch.where(_expand(lost, y), torch.nan, y)


def _dormand_prince(field: Field, y: Tensor, slope: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step: the fifth-order proposal, its error estimate and the slope there."""
    slopes = [slope]
    for row in _STAGES:
        at = y
        for weight, k in zip(row, slopes):
            if weight:
                at = at + (dt * weight) * k
        slopes.append(field(at))
    error = sum((dt * weight) * k for weight, k in zip(_ERROR, slopes) if weight)
    assert isinstance(error, Tensor)
    return at, error, slopes[-1]


def _expand(mask: Tensor, like: Tensor) -> Tensor:
    return mask[(...,) + (None,) * 3].expand_as(like)


def _freeze(y: Tensor, lost: Tensor, start: Tensor) -> Tensor:
    """Lost elements stand still at the start, so that they neither overflow nor govern the step."""
    return torch.where(_expand(lost, y), start, y)
