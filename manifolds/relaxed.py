"""The covariantly relaxed metrics of a factor pair, by their definition, and their connection.

No closed form is known for their Christoffel symbols, so these come from automatic differentiation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manifolds.geodesic import integrate
from manifolds.linalg import gram, split, square_root


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """``A # B = A (A^-1 B)^(1/2)`` of Hermitian positive definite matrices, differentiable everywhere.

    >>> a = 4 * torch.eye(1, dtype=torch.float64)
    >>> round(float(geometric_mean(a, 9 * a / 4)), 12)
    6.0
    """
    return a @ square_root(torch.linalg.solve(a, b))


@dataclass(frozen=True)
class RelaxedMetric:
    """``P_G = M_G + eps (M_G # M_H^-1)``, ``P_H = M_H + eps (M_H # M_G^-1)`` for the Grams (derived here).

    inv: ``Tr(P_G^-1 u_G^H v_G) + Tr(P_H^-1 u_H^H v_H)``;  mix: ``Tr(P_H u_G^H v_G) + Tr(P_G u_H^H v_H)``.
    """

    rows: int
    metric: str
    eps: float

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices that stand in the two traces."""
        m_g, m_h = (gram(side) for side in split(x, self.rows))
        p_g = m_g + self.eps * geometric_mean(m_g, torch.linalg.inv(m_h))
        p_h = m_h + self.eps * geometric_mean(m_h, torch.linalg.inv(m_g))
        return (torch.linalg.inv(p_g), torch.linalg.inv(p_h)) if self.metric == "inv" else (p_h, p_g)

    def lower(self, x: Tensor, u: Tensor) -> Tensor:
        """The covector ``v -> <u, v>`` as a stacked pair."""
        sides = zip(split(u, self.rows), self.weights(x))
        return torch.cat([side @ weight for side, weight in sides], dim=-2)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """``<u, v>`` at ``x``."""
        return (self.lower(x, u) * v.conj()).real.sum((-2, -1))

    def christoffel(self, x: Tensor, u: Tensor) -> Tensor:
        """``Gamma(u, u) = g^-1 [D_u (g u) - 1/2 grad g(u, u)]``."""
        change = torch.func.jvp(lambda point: self.lower(point, u), (x,), (u,))[1]
        slope = torch.func.grad(lambda point: self.inner(point, u, u).sum())(x)
        sides = zip(split(change - 0.5 * slope, self.rows), self.weights(x))
        return torch.cat([torch.linalg.solve(weight, side, left=False) for side, weight in sides], dim=-2)

    def geodesic(self, x: Tensor, u: Tensor, t: float | Tensor) -> Tensor:
        """The geodesic at time ``t`` by adaptive Runge-Kutta; NaN where it leaves the domain."""

        def field(state: Tensor) -> Tensor:
            point, velocity = state.unbind(-3)
            return torch.stack([velocity, -self.christoffel(point, velocity)], dim=-3)

        return integrate(field, torch.stack([x, u], dim=-3), t).select(-3, 0)
