"""Inverse square roots of metrics, as maps between a flat space and orthonormal coordinates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from manifolds.linalg import eigh


def split_spectrum(values: Tensor, pinv: bool, computed: bool = True, what: str = "metric") -> Tensor:
    """Which eigenvalues count as positive; ``ValueError`` for an indefinite metric, or a singular one without ``pinv``.

    Where ``eigh`` has ``computed`` them, ``d eps`` (at least 1e-13 in double precision) relative to the largest counts
    as zero.  The entries of a diagonal are exact: there only zero is zero.
    """
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{what}: needed finite entries at the parameters")
    largest = float(values.abs().max())
    floor = largest * max(values.numel() * torch.finfo(values.dtype).eps, 1e-13) if computed else 0.0
    if float(values.min()) < -floor:
        raise ValueError(f"{what}: indefinite, with eigenvalue {float(values.min()):.3g}; needed a positive one")
    positive = values > floor
    if largest == 0 or not (pinv or bool(positive.all())):
        raise ValueError(
            f"{what}: singular, {int((~positive).sum())} of {values.numel()} eigenvalues are zero to rounding; add a "
            "multiple of the identity, or pass pinv=True for a map that is not a bijection"
        )
    return positive


def check_symmetric(matrix: Tensor, what: str = "metric") -> None:
    """``ValueError`` for a matrix that differs from its transpose by more than 1e-5 of its largest entry."""
    if not torch.allclose(matrix, matrix.T, rtol=1e-5, atol=1e-5 * float(matrix.abs().max())):
        raise ValueError(f"{what}: the matrix is not symmetric")


class Frame(ABC):
    """``E (d, r)`` with ``E E^T = G^-1`` (or the pseudo-inverse), and its left inverse."""

    size: int

    @abstractmethod
    def expand(self, y: Tensor) -> Tensor:
        """``E y``, columns ``(r, k) -> (d, k)``."""

    @abstractmethod
    def contract(self, w: Tensor) -> Tensor:
        """``E^T w``, ``(d, k) -> (r, k)``."""

    @abstractmethod
    def coordinates(self, u: Tensor) -> Tensor:
        """``E^+ u``, ``(d, k) -> (r, k)``."""


class DenseFrame(Frame):
    """``G^-1/2``, symmetric, for a regular metric; eigenvectors over roots of eigenvalues for a singular one."""

    def __init__(self, values: Tensor, vectors: Tensor, positive: Tensor):
        values, vectors = values[positive], vectors[:, positive]
        self.root, self.inverse = vectors * values.rsqrt(), vectors * values.sqrt()
        if bool(positive.all()):
            self.root, self.inverse = self.root @ vectors.T, self.inverse @ vectors.T
        self.size = self.root.shape[1]

    def expand(self, y: Tensor) -> Tensor:
        """``E y``."""
        return self.root @ y

    def contract(self, w: Tensor) -> Tensor:
        """``E^T w``."""
        return self.root.T @ w

    def coordinates(self, u: Tensor) -> Tensor:
        """``E^+ u``."""
        return self.inverse.T @ u


class DiagonalFrame(Frame):
    """``g^-1/2``, on the entries that are not zero."""

    def __init__(self, diagonal: Tensor, positive: Tensor):
        self.kept, self.total = positive.nonzero().squeeze(1), diagonal.numel()
        self.root, self.size = diagonal[self.kept].sqrt().unsqueeze(1), int(self.kept.numel())

    def expand(self, y: Tensor) -> Tensor:
        """``E y``."""
        return y.new_zeros(self.total, y.shape[1]).index_copy(0, self.kept, y / self.root)

    def contract(self, w: Tensor) -> Tensor:
        """``E^T w``."""
        return w.index_select(0, self.kept) / self.root

    def coordinates(self, u: Tensor) -> Tensor:
        """``E^+ u``."""
        return u.index_select(0, self.kept) * self.root


class KroneckerFrame(Frame):
    """``W -> B^-1/2 W A^-1/2`` for each parameter; symmetric."""

    def __init__(self, factors: Mapping[str, tuple[Tensor | None, Tensor | None]], shapes: Mapping[str, torch.Size]):
        self.shapes = shapes
        self.roots = {name: tuple(_powers(f, side, name) for side, f in zip(("left", "right"), pair))
                      for name, pair in factors.items()}
        self.size = sum(shape.numel() for shape in shapes.values())

    def expand(self, y: Tensor) -> Tensor:
        """``E y``."""
        return self._apply(y, 0)

    def contract(self, w: Tensor) -> Tensor:
        """``E^T w``, which is ``E w``."""
        return self._apply(w, 0)

    def coordinates(self, u: Tensor) -> Tensor:
        """``E^-1 u``."""
        return self._apply(u, 1)

    def _apply(self, v: Tensor, power: int) -> Tensor:
        pieces = []
        for (name, shape), piece in zip(self.shapes.items(), v.split([s.numel() for s in self.shapes.values()])):
            left, right = self.roots.get(name, (None, None))
            w = piece.T.reshape(v.shape[1], -1, shape[-1] if shape else 1)
            w = w if left is None else left[power].to(w) @ w
            w = w if right is None else w @ right[power].to(w)
            pieces.append(w.flatten(1))
        return torch.cat(pieces, dim=1).T


def _powers(factor: Tensor | None, side: str, name: str) -> tuple[Tensor, Tensor] | None:
    """The powers -1/2 and 1/2 of a positive definite factor."""
    if factor is None:
        return None
    what = f"metric, {side} factor of {name!r}"
    if not bool(torch.isfinite(factor).all()):
        raise ValueError(f"{what}: needed finite entries")
    check_symmetric(factor, what)
    values, vectors = eigh(factor)
    split_spectrum(values, pinv=False, what=what)
    return (vectors * values.rsqrt()) @ vectors.T, (vectors * values.sqrt()) @ vectors.T
