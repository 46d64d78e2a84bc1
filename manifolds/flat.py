"""Euclidean space, with the interface of the curved ones."""

from __future__ import annotations

import torch
from torch import Tensor

from manifolds.base import Curve, QuotientManifold, linear, unknown_method


class Flat(QuotientManifold):
    """R^n with ``<u, v> = sum_i u_i v_i`` and the trivial group; points ``(..., n)``.

    >>> float(Flat().dist(torch.zeros(2), torch.tensor([3.0, 4.0])))
    5.0
    """

    name = "Flat"
    ndim = 1
    reversible = True

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """The dot product, shape ``(...)``."""
        return (u * (u if v is None else v)).sum(-1, keepdim=keepdim)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The identity."""
        return u

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """The identity."""
        return u

    def vertical(self, x: Tensor, algebra: Tensor) -> Tensor:
        """Zero: nothing is quotiented."""
        return torch.zeros_like(x)

    def christoffel(self, x: Tensor, u: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(u)

    def geodesic(self, x: Tensor, u: Tensor, method: str = "exact") -> Curve:
        """The straight line, for every method."""
        if method not in ("exact", "taylor2", "linear"):
            raise unknown_method(method)
        return linear(x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """``y - x``."""
        return y - x

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """``|y - x|``."""
        return torch.linalg.vector_norm(y - x, dim=-1, keepdim=keepdim)
