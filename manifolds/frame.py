"""A pair of factors in its balanced gauge, with coordinates in which the metric is the identity.

Everything a quotient by GL(h) needs is cheap there: both Gram matrices are one diagonal ``D``, the metric is a
weight per column, the horizontal projection an elementwise division, the geodesic two small exponentials.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from manifolds.geodesic import (
    christoffel_inv,
    christoffel_mix,
    connection_inv,
    connection_mix,
    exact_inv,
    exact_mix,
)
from manifolds.linalg import balance, divide, eigh, gram, split, widen
from manifolds.relaxed import RelaxedMetric

METRICS = ("inv", "mix")
RELAXATION = 1e-6  # for pairs without full rank, relative to their largest singular value


@dataclass(frozen=True)
class PairFrame:
    """Pairs ``[G; H] (..., n + m, h)`` carried into the balanced gauge, with an orthonormal frame.

    A tangent vector ``u`` of the balanced point has coordinates ``z = u w^(1/2)`` (``w`` a weight per column),
    so that ``<u, v> = Re sum z_u conj(z_v)``.  Built by :func:`frame`.

    point : balanced ``[G A^-1; H A^H]``;  gauge, inverse : ``A``, ``A^-1``;  spectrum : ``D``;  root : ``w^(1/2)``;
    scaled : ``point w^(-1/2)``, whose horizontal condition is the Sylvester equation
    ``(scaled_G^H scaled_G) X + X (scaled_H^H scaled_H) = z_H^H scaled_H - scaled_G^H z_G``;
    reciprocal : pseudo-inverse of the sums of eigenvalues of its two coefficients, whose eigenvectors are
    ``left`` and ``right`` (None where all pairs have full rank: then both coefficients are diagonal);
    deficient : pairs without full rank, handled by the covariant relaxation.
    """

    rows: int
    metric: str
    eps: float
    point: Tensor
    gauge: Tensor
    inverse: Tensor
    spectrum: Tensor
    root: Tensor
    scaled: Tensor
    reciprocal: Tensor
    deficient: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def to(self, dtype: torch.dtype) -> PairFrame:
        """The same frame in the precision of ``dtype`` (real or complex as it was)."""
        real = {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)
        kinds = {torch.float32: torch.complex64, torch.float64: torch.complex128}
        target = {k: kinds[real] if getattr(self, k).is_complex() else real for k in self._tensors()}
        return replace(self, **{k: getattr(self, k).to(target[k]) for k in target})

    def _tensors(self) -> list[str]:
        names = [f.name for f in fields(self) if f.name not in ("rows", "metric", "eps", "deficient")]
        return [name for name in names if getattr(self, name) is not None]

    @property
    def relaxed(self) -> bool:
        """Whether any pair of the batch lacks full rank."""
        return self.left is not None

    def coordinates(self, u: Tensor) -> Tensor:
        """Coordinates of a tangent vector given at the original, unbalanced point."""
        g, h = split(u, self.rows)
        return torch.cat([g @ self.inverse, h @ self.gauge.mH], dim=-2) * self.root

    def tangent(self, z: Tensor) -> Tensor:
        """The tangent vector at the original point that has coordinates ``z``."""
        return self.restore(z / self.root)

    def restore(self, balanced: Tensor) -> Tensor:
        """A balanced point or vector carried back into the original gauge."""
        g, h = split(balanced, self.rows)
        return torch.cat([g @ self.gauge, h @ self.inverse.mH], dim=-2)

    def raise_index(self, gradient: Tensor) -> Tensor:
        """Coordinates of the Riemannian gradient, from the Euclidean gradient at the original point."""
        g, h = split(gradient, self.rows)
        return torch.cat([g @ self.gauge.mH, h @ self.inverse], dim=-2) / self.root

    def vertical_part(self, z: Tensor) -> Tensor:
        """``X (..., h, h)`` such that ``z + [scaled_G X; -scaled_H X^H]`` is horizontal."""
        z_g, z_h = split(z, self.rows)
        s_g, s_h = split(self.scaled, self.rows)
        rhs = z_h.mH @ s_h - s_g.mH @ z_g
        if self.left is None or self.right is None:
            return rhs * self.reciprocal
        return self.left @ ((self.left.mH @ rhs @ self.right) * self.reciprocal) @ self.right.mH

    def project(self, z: Tensor) -> Tensor:
        """Orthogonal projection of coordinates onto the horizontal space."""
        x = self.vertical_part(z)
        s_g, s_h = split(self.scaled, self.rows)
        return z + torch.cat([s_g @ x, -(s_h @ x.mH)], dim=-2)

    def curve(self, z: Tensor, t: float | Tensor, method: str, bound: float | None = None) -> Tensor:
        """The balanced point reached from coordinates ``z`` at time ``t``; NaN outside the metric's domain.

        Pairs without full rank follow the straight line, which exists for the relaxed metric too.
        """
        straight = self.point + (t / self.root) * z
        if method == "linear":
            return straight
        if method == "taylor2":
            return straight - (0.5 * t * t) * self.bend(z)
        moved = self._exact(self._regular(z), t, bound)
        return torch.where(self.deficient[..., None, None], straight, moved) if self.relaxed else moved

    def bend(self, z: Tensor) -> Tensor:
        """Gamma(u, u) of the vector with coordinates ``z``, in the balanced gauge (0 for deficient pairs)."""
        z = self._regular(z)
        if self.eps:
            return self._relaxed_metric().christoffel(self.point.expand_as(z).contiguous(), z / self.root)
        if self.metric == "inv":
            scale = self.spectrum.sqrt().unsqueeze(-2)
            eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
            sides = zip(split(self.point / scale, self.rows), split(z, self.rows))
            return torch.cat([christoffel_inv(q, v, eye) for q, v in sides], dim=-2) * scale
        (g, h), (x, y) = split(self.point, self.rows), split(z / self.root, self.rows)
        inverse = torch.diag_embed(1 / self.spectrum).to(g.dtype)
        bends = christoffel_mix(g, x, h, y, inverse), christoffel_mix(h, y, g, x, inverse)
        return torch.cat(bends, dim=-2)

    def connection(self, slope: Tensor, z: Tensor) -> Tensor:
        """``<slope, Gamma(z, .)>``, a covector in coordinates like ``slope``; ``z (..., B, n + m, h)``.

        In closed form, and for the relaxed metric as the gradient of ``<slope, Gamma(z, z)> / 2``.
        """
        if self.eps:
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                form = 0.5 * (slope.conj() * (self.bend(z) * self.root)).real.sum()
                return torch.autograd.grad(form, z)[0]
        if self.metric == "inv":
            sides = zip(*(split(a, self.rows) for a in (self.point * self.root, z, slope)))
            bent = torch.cat([connection_inv(*side) for side in sides], dim=-2)
        else:
            (g, h), (x, y) = split(self.point, self.rows), split(z / self.root, self.rows)
            slope_g, slope_h = split(slope * (self.root / self.spectrum.unsqueeze(-2)), self.rows)
            bent = torch.cat(connection_mix(g, h, x, y, slope_g, slope_h), dim=-2) / self.root
        return torch.where(self.deficient[..., None, None], 0.0, bent) if self.relaxed else bent

    def _exact(self, z: Tensor, t: float | Tensor, bound: float | None) -> Tensor:
        if self.eps:
            return self._relaxed_metric().geodesic(self.point, z / self.root, t)
        if self.metric == "inv":
            scale = self.spectrum.sqrt().unsqueeze(-2)
            sides = zip(split(self.point / scale, self.rows), split(z, self.rows))
            return torch.cat([exact_inv(q, v, t, bound) for q, v in sides], dim=-2) * scale
        (g, h), (x, y) = split(self.point, self.rows), split(z / self.root, self.rows)
        return torch.cat(exact_mix(g, h, x, y, t), dim=-2)

    def _relaxed_metric(self) -> RelaxedMetric:
        if self.relaxed:
            raise ValueError(
                f"{int(self.deficient.sum())} pairs lack full rank: with eps > 0 only geodesic='linear' exists there"
            )
        return RelaxedMetric(self.rows, self.metric, self.eps)

    def _regular(self, z: Tensor) -> Tensor:
        return torch.where(self.deficient[..., None, None], 0.0, z) if self.relaxed else z


def frame(x: Tensor, rows: int, metric: str, eps: float = 0.0) -> PairFrame:
    """Balances the pairs ``x (..., n + m, h)`` and builds their orthonormal frame, in double precision.

    Weights per column: ``inv`` has ``w = 1 / (D + eps)``, ``mix`` has ``w = D + eps``.  In a general gauge this
    is the *covariant* relaxation ``M_G + eps (M_G # M_H^-1)``, ``M_H + eps (M_H # M_G^-1)`` with the matrix
    geometric mean ``#``; adding ``eps I`` instead would destroy the invariance (derived here).
    """
    precision = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps  # half precision is a storage format
    threshold = max(1e-10, 30 * precision)
    x = widen(x)
    g, h = split(x, rows)
    gauge, inverse, spectrum, deficient = balance(g, h, threshold)
    phase = _phases(g @ inverse)
    gauge, inverse = phase.mH * gauge, inverse * phase
    point = torch.cat([g @ inverse, h @ gauge.mH], dim=-2)
    lift = eps + torch.where(deficient.unsqueeze(-1), RELAXATION * spectrum.amax(-1, keepdim=True), 0.0)
    relaxed = spectrum + lift
    weight = relaxed.reciprocal() if metric == "inv" else relaxed
    root = weight.sqrt().unsqueeze(-2)
    diagonal = spectrum / weight
    reciprocal = 1 / (diagonal.unsqueeze(-1) + diagonal.unsqueeze(-2))
    full = PairFrame(rows, metric, eps, point, gauge, inverse, spectrum, root, point / root, reciprocal, deficient)
    return _resolve_deficient(full) if bool(deficient.any()) else full


def _phases(g: Tensor) -> Tensor:
    """Phases ``(..., 1, h)`` that make the largest entry of each column positive: the gauge becomes unique."""
    largest = g.gather(-2, g.abs().argmax(-2, keepdim=True))
    size = largest.abs()
    return torch.where(size > 0, largest.conj() / torch.where(size > 0, size, 1.0), 1.0)


def _resolve_deficient(f: PairFrame) -> PairFrame:
    """Replaces the diagonal solve by a general one for the pairs whose balanced Grams are not diagonal."""
    (values_l, left), (values_r, right) = (eigh(gram(s)) for s in split(f.scaled, f.rows))
    total = values_l.clamp_min(0).unsqueeze(-1) + values_r.clamp_min(0).unsqueeze(-2)
    mask = f.deficient[..., None, None]
    eye = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
    reciprocal = torch.where(mask, divide(torch.ones_like(total), total), f.reciprocal)
    return replace(f, reciprocal=reciprocal, left=torch.where(mask, left, eye), right=torch.where(mask, right, eye))
