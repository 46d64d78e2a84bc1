r"""The embedded geometry of matrices of rank r, on factor pairs in the balanced gauge (derived here).

A matrix is ``G H^H``; a velocity ``(X, Y)`` of the pair moves it by ``X H^H + G Y^H``.  With the Grams
``M = G^H G``, ``N = H^H H`` and the relative velocities ``E = M^-1 G^H X``, ``F = N^-1 H^H Y``, the metric

    |X H^H + G Y^H|^2 + |G (E - F^H) H^H|^2 = Tr N (X^H X + E^H M E) + Tr M (Y^H Y + F^H N F)

is invariant under GL(r).  Its second term vanishes on the horizontal space ``E = F^H``, so the quotient is the
manifold of matrices of rank r with the Frobenius metric of the ambient space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manifolds.geodesic import integrate
from manifolds.linalg import balance, gram, split, widen

Sides = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class EmbeddedFrame:
    """Pairs carried into a gauge that is balanced and a constant for autograd: everything here is smooth.

    g, h : ``(..., m, r)``, ``(..., n, r)`` with the Grams ``M``, ``N``;  m_inverse, n_inverse : ``M^-1``,
    ``N^-1``;  gauge, inverse : ``A``, ``A^-1`` with ``g = G A^-1``, ``h = H A^H``;  deficient : pairs whose
    product has a smaller rank, where nothing below is defined.
    """

    g: Tensor
    h: Tensor
    m_inverse: Tensor
    n_inverse: Tensor
    gauge: Tensor
    inverse: Tensor
    deficient: Tensor

    def enter(self, u: Tensor) -> Sides:
        """A stacked vector at the original pair, carried into the balanced gauge."""
        u_g, u_h = split(u, self.rows)
        return u_g @ self.inverse, u_h @ self.gauge.mH

    def leave(self, sides: Sides) -> Tensor:
        """A pair, or a vector, carried back into the original gauge and stacked."""
        x, y = sides
        return torch.cat([x @ self.gauge, y @ self.inverse.mH], dim=-2)

    def enter_covector(self, u: Tensor) -> Sides:
        """A stacked Euclidean gradient at the original pair, carried into the balanced gauge."""
        u_g, u_h = split(u, self.rows)
        return u_g @ self.gauge.mH, u_h @ self.inverse

    @property
    def rows(self) -> int:
        """The number of rows of ``G``."""
        return self.g.shape[-2]

    def relative(self, sides: Sides) -> Sides:
        """``E = M^-1 G^H X`` and ``F = N^-1 H^H Y``."""
        x, y = sides
        return self.m_inverse @ (self.g.mH @ x), self.n_inverse @ (self.h.mH @ y)

    def lower(self, sides: Sides) -> Sides:
        """The covector ``((X + G E) N, (Y + H F) M)`` of a vector."""
        (x, y), (e, f) = sides, self.relative(sides)
        return (x + self.g @ e) @ gram(self.h), (y + self.h @ f) @ gram(self.g)

    def raise_index(self, sides: Sides) -> Sides:
        """The vector of a covector: the inverse of :meth:`lower`."""
        (x, y), (e, f) = sides, self.relative(sides)
        return (x - 0.5 * (self.g @ e)) @ self.n_inverse, (y - 0.5 * (self.h @ f)) @ self.m_inverse

    def push(self, sides: Sides) -> Tensor:
        """``X H^H + G Y^H``, dense."""
        return sides[0] @ self.h.mH + self.g @ sides[1].mH

    def project(self, sides: Sides) -> Sides:
        """The horizontal part ``(X + G L, Y - H L^H)`` with ``L = (F^H - E) / 2``."""
        (x, y), (e, f) = sides, self.relative(sides)
        turn = 0.5 * (f.mH - e)
        return x + self.g @ turn, y - self.h @ turn.mH

    def lift(self, xi_h: Tensor, xi_g: Tensor) -> Sides:
        """The horizontal vector that moves ``G H^H`` by the tangent part of ``xi``, from ``xi H`` and ``xi^H G``."""
        core = 0.5 * (self.m_inverse @ (self.g.mH @ xi_h) @ self.n_inverse)
        return xi_h @ self.n_inverse - self.g @ core, xi_g @ self.m_inverse - self.h @ core.mH

    def normal(self, sides: Sides) -> Sides:
        """``X - G E`` and ``Y - H F``: what leaves the column spaces."""
        (x, y), (e, f) = sides, self.relative(sides)
        return x - self.g @ e, y - self.h @ f

    def acceleration(self, sides: Sides) -> Sides:
        """``-Gamma(u, u)`` of the metric above."""
        grams, inverses, relative, squares = (
            torch.stack(pair, dim=-3)
            for pair in (
                (gram(self.g), gram(self.h)),
                (self.m_inverse, self.n_inverse),
                self.relative(sides),
                (gram(sides[0]), gram(sides[1])),
            )
        )
        along, across = _coefficients(grams, inverses, relative, squares)
        moved = zip((self.g, self.h), sides, along.unbind(-3), across.unbind(-3))
        x, y = (point @ c0 + velocity @ c1 for point, velocity, c0, c1 in moved)
        return x, y

    def curve(self, sides: Sides, t: float | Tensor) -> Sides:
        """The geodesic at time ``t``, by adaptive extrapolation; NaN where the rank drops before ``t``.

        The motion is a right multiplication by small matrices: the pair stays in the spans of ``[X, G]`` and
        ``[Y, H]``, and only its ``2r x r`` coefficients are integrated.
        """
        spans = torch.cat([sides[0], self.g], dim=-1), torch.cat([sides[1], self.h], dim=-1)
        grams = torch.stack([gram(span) for span in spans], dim=-3)  # (..., 2, 2r, 2r)
        size = self.g.shape[-1]
        eye = torch.eye(2 * size, dtype=self.g.dtype, device=self.g.device).expand_as(grams)
        start = torch.cat([eye[..., size:], eye[..., :size]], dim=-1)  # positions and velocities

        def field(state: Tensor) -> Tensor:
            position, velocity = state.split(size, dim=-1)
            image = grams @ velocity
            m = position.mH @ grams @ position
            inverse = torch.linalg.inv_ex(m).inverse  # of a singular one inf or NaN, where the integrator stops
            along, across = _coefficients(m, inverse, inverse @ (position.mH @ image), velocity.mH @ image)
            return torch.cat([velocity, position @ along + velocity @ across], dim=-1)

        end = integrate(field, start, t)[..., :size]
        return spans[0] @ end[..., 0, :, :], spans[1] @ end[..., 1, :, :]

    def represent(self, b: Tensor, a: Tensor) -> Sides:
        """A pair with the product ``Y = B A`` that is ``(G, H)`` at ``Y = G H^H`` and departs from it horizontally.

        With ``W = G^+ Y (H^+)^H`` it is ``Y (H^+)^H C``, ``Y^H (G^+)^H D``, where ``C D^H = W^-1``,
        ``C = 2 (I + W)^-1``.  Where ``W`` or ``I + W`` is nearly singular (``Y`` is far away) no such pair
        exists, and it is ``(B, A^H)`` itself.
        """
        left, right = self.m_inverse @ (self.g.mH @ b), a @ (self.h @ self.n_inverse)
        w = left @ right
        eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device).expand_as(w)
        inverse, half = torch.linalg.inv_ex(w).inverse, torch.linalg.inv_ex(eye + w).inverse
        size = torch.linalg.matrix_norm(w) * torch.linalg.matrix_norm(inverse) + torch.linalg.matrix_norm(half)
        near = (size < _FAR)[..., None, None]
        g = b @ (right @ (2 * half))
        h = a.mH @ (left.mH @ (0.5 * (eye + inverse.mH)))
        return torch.where(near, g, b), torch.where(near, h, a.mH)


_FAR = 1e6  # condition of the change of gauge beyond which it would spoil more digits than it is worth


def _coefficients(m: Tensor, m_inverse: Tensor, e: Tensor, xx: Tensor) -> Sides:
    """``(C_0, C_1)`` of the geodesic equation ``X' = G C_0 + X C_1``, for both sides stacked: ``(..., 2, r, r)``.

    From the Grams ``(M, N)``, their inverses, ``(E, F)`` and ``(X^H X, Y^H Y)``:

        C_1 = N E^H N^-1 - N F N^-1 - E - F^H
        C_0 = E^2 - E N E^H N^-1 + [M^-1 (E^H M E - X^H X) + (Y^H Y + F^H N F) N^-1] / 2

    For horizontal velocities ``C_1 = -2 E``, and the matrix moves by ``(G H^H)'' = 2 X_n Y_n^H`` with the normal
    parts ``X_n = X - G E``, ``Y_n = Y - H F``: the second fundamental form ``2 U_p S^-1 V_p^H``.
    """
    n, n_inverse, f, yy = (side.flip(-3) for side in (m, m_inverse, e, xx))
    turned = n @ e.mH @ n_inverse
    bend = m_inverse @ (e.mH @ m @ e - xx) + (yy + f.mH @ n @ f) @ n_inverse
    return e @ (e - turned) + 0.5 * bend, turned - n @ f @ n_inverse - e - f.mH


def stacked_frame(x: Tensor, rows: int, threshold: float) -> EmbeddedFrame:
    """The frame of stacked pairs ``[G; H] (..., n + m, r)``, in double precision."""
    g, h = split(widen(x), rows)
    own = balance(g.detach(), h.detach(), threshold)
    return pair_frame(g @ own.inverse, h @ own.gauge.mH, own.gauge, own.inverse, own.deficient)


def dense_frame(x: Tensor, rank: int, threshold: float) -> EmbeddedFrame:
    """The frame of matrices ``x (..., m, n)``; of those with a larger rank only the leading part is seen.

    With the constants ``U``, ``S``, ``V`` of the singular value decomposition the pair is ``G = x V S^(-1/2)``,
    ``H^H = S^(1/2) (U^H x V)^-1 U^H x``, whose derivatives exist also where singular values coincide.
    """
    x = widen(x)
    u, s, vh = torch.linalg.svd(x.detach(), full_matrices=False)
    u, s, v = u[..., :rank], s[..., :rank], vh[..., :rank, :].mH
    deficient = s[..., -1] <= threshold * s[..., 0]
    s = torch.where(deficient.unsqueeze(-1), 1.0, s)
    root = s.sqrt().unsqueeze(-2)
    right = u.mH @ x
    core = torch.linalg.inv_ex(right @ v).inverse
    eye = torch.eye(rank, dtype=x.dtype, device=x.device).expand(*x.shape[:-2], rank, rank)
    return pair_frame(x @ (v / root), (root.mT * (core @ right)).mH, eye, eye, deficient)


def pair_frame(g: Tensor, h: Tensor, gauge: Tensor, inverse: Tensor, deficient: Tensor) -> EmbeddedFrame:
    """The frame of a pair that is balanced already."""
    m_inverse, n_inverse = (torch.linalg.inv_ex(gram(side)).inverse for side in (g, h))
    return EmbeddedFrame(g, h, m_inverse, n_inverse, gauge, inverse, deficient)
