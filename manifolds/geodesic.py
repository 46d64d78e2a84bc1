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


def connection_inv(q: Tensor, z: Tensor, slope: Tensor) -> Tensor:
    """``<slope, Gamma(z, .)>`` for one side of the metric ``Tr(u^H u)`` at orthonormal columns ``q``:

        z H(slope^H q) - q H(slope^H z) - slope H(q^H z),    H(a) = (a + a^H) / 2

    the polarisation of :func:`christoffel_inv` against ``slope`` (derived here).
    """
    dual = slope.mH
    return z @ _hermitian(dual @ q) - q @ _hermitian(dual @ z) - slope @ _hermitian(q.mH @ z)


def connection_mix(g: Tensor, h: Tensor, x: Tensor, y: Tensor, slope_g: Tensor,
                   slope_h: Tensor) -> tuple[Tensor, Tensor]:
    """``<(slope_g N, slope_h M), Gamma((x, y), .)>`` for ``Tr(N X^H X) + Tr(M Y^H Y)``; the side of G is

        g H(slope_h^H y) + slope_g H(h^H y) - x H(slope_h^H h),    H(a) = (a + a^H) / 2

    the polarisation of :func:`christoffel_mix` (derived here).
    """
    def side(g: Tensor, x: Tensor, slope: Tensor, h: Tensor, y: Tensor, other: Tensor) -> Tensor:
        dual = other.mH
        return g @ _hermitian(dual @ y) + slope @ _hermitian(h.mH @ y) - x @ _hermitian(dual @ h)

    return side(g, x, slope_g, h, y, slope_h), side(h, y, slope_h, g, x, slope_g)


def _hermitian(a: Tensor) -> Tensor:
    return 0.5 * (a + a.mH)


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
    """The geodesic of ``Tr(N X^H X) + Tr(M Y^H Y)``, by adaptive extrapolation on the coefficients.

    ``G'' = (G Y^H Y - X (Y^H H + H^H Y)) N^-1`` and likewise for ``H`` (Hide & Seek, Eq. 12).  The metric is
    geodesically incomplete: a pair whose Gram matrix becomes singular before ``t`` gets NaN.
    """
    size = g.shape[-1]
    spans = torch.cat([x, g], dim=-1), torch.cat([y, h], dim=-1)
    grams = torch.stack([gram(span) for span in spans], dim=-3)  # (..., 2, 2h, 2h)
    eye = torch.eye(2 * size, dtype=g.dtype, device=g.device).expand_as(grams)
    start = torch.cat([eye[..., size:], eye[..., :size]], dim=-1)  # positions and velocities, (..., 2, 2h, 2h)

    def field(state: Tensor) -> Tensor:
        position, velocity = state.split(size, dim=-1)
        image = grams @ position
        other, cross = (position.mH @ image).flip(-3), (velocity.mH @ image).flip(-3)
        bend = position @ (velocity.mH @ grams @ velocity).flip(-3) - velocity @ (cross + cross.mH)
        return torch.cat([velocity, _right_solve(bend, other)], dim=-1)

    end = integrate(field, start, t)[..., :size]
    return spans[0] @ end[..., 0, :, :], spans[1] @ end[..., 1, :, :]


def _right_solve(a: Tensor, gram_matrix: Tensor) -> Tensor:
    """``a M^-1`` for Hermitian ``M`` (a singular one gives inf, which the integrator takes as leaving)."""
    solution, _ = torch.linalg.solve_ex(gram_matrix.mH, a.mH)
    return solution.mH


_SUBSTEPS = (2, 4, 6, 8, 10)  # of the modified midpoint rule, extrapolated to order 10
_SMALLEST_STEP = 1e-5  # of the whole interval: below this a solution is taken to have left its domain


def integrate(field: Field, start: Tensor, t: float | Tensor, tolerance: float | None = None) -> Tensor:
    """The solution at time ``t`` of ``y' = field(y)``, ``y(0) = start``, with adaptive steps.

    Steps are common to the batch (all dimensions before the last three) and differentiable by plain autograd.
    Elements whose solution does not reach ``t`` (error still above tolerance at the smallest step) become NaN;
    the others are not affected by them.
    """
    if tolerance is None:
        tolerance = 1e-11 if torch.finfo(start.dtype).eps < 1e-10 else 1e-5
    y, done, step = start, 0.0, 1.0
    lost = torch.zeros(start.shape[:-3], dtype=torch.bool, device=start.device)
    slope = field(y)

    def ratio(correction: Tensor) -> Tensor:
        size = tolerance * (1.0 + y.detach().abs().amax((-3, -2, -1)))
        value = correction.detach().abs().amax((-3, -2, -1)) / size
        return torch.where(lost, 0.0, torch.nan_to_num(value, nan=torch.inf))

    while done < 1.0:
        step = min(step, 1.0 - done)
        proposal, errors, order = _extrapolate(field, y, slope, step * t, ratio)
        worst = float(errors.max()) if errors.numel() else 0.0
        if worst > 1.0 and step <= _SMALLEST_STEP:
            lost, step = lost | (errors > 1.0), 1.0
            y, slope = _freeze(y, lost, start), _freeze(slope, lost, start)
            continue
        if worst <= 1.0:
            done += step
            y = torch.where(_expand(lost, y), y, proposal)
            slope = field(y) if done < 1.0 else slope
        step = max(step * min(4.0, max(0.1, 0.8 * max(worst, 1e-12) ** (-1 / order))), _SMALLEST_STEP)
    return torch.where(_expand(lost, y), torch.nan, y)


def _extrapolate(
    field: Field, y: Tensor, slope: Tensor, dt: float | Tensor, ratio: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, int]:
    """One Gragg-Bulirsch-Stoer step: midpoint rules extrapolated in ``dt^2`` until the last correction is small.

    Returns the value, the correction relative to the tolerance, and the order in ``dt`` of that correction.
    """
    table: list[Tensor] = []
    for k, count in enumerate(_SUBSTEPS):
        h = dt / count
        before, now = y, y + h * slope
        for _ in range(count - 1):
            before, now = now, before + (2 * h) * field(now)
        row = [0.5 * (now + before + h * field(now))]
        for j in range(k):
            weight = 1.0 / ((count / _SUBSTEPS[k - 1 - j]) ** 2 - 1)
            row.append(row[j] + weight * (row[j] - table[j]))
        table = row
        if k and (k == len(_SUBSTEPS) - 1 or bool((ratio(table[-1] - table[-2]) <= 1.0).all())):
            break
    return table[-1], ratio(table[-1] - table[-2]), 2 * k + 1


def _expand(mask: Tensor, like: Tensor) -> Tensor:
    return mask[(...,) + (None,) * 3].expand_as(like)


def _freeze(y: Tensor, lost: Tensor, start: Tensor) -> Tensor:
    """Lost elements stand still at the start, so that they neither overflow nor govern the step."""
    return torch.where(_expand(lost, y), start, y)
