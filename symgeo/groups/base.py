"""The base class of all groups: a leaf states its defining facts, this file derives the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from symgeo.errors import SymmetryError
from symgeo.groups import sampling


@dataclass(frozen=True)
class Group(ABC):
    """A group that acts linearly on an axis of length n.

    An element is a tensor (*batch, *element_shape(n)): one independent element for each index of `batch`.
    An algebra element (a tangent vector at the identity) has the shape and the meaning of an element.

    Parameters
    ----------
    per: the name of another factor; the group has one independent element for each of its indices.
    """

    per: str | None = None

    #: every element preserves the Euclidean norm, so that the dual action is the action
    orthogonal: ClassVar[bool]
    #: the algebra is zero
    discrete: ClassVar[bool]
    #: elements map coordinates to multiples of coordinates, so that another group can be `per` such a factor
    monomial: ClassVar[bool]
    #: with `per`, the factor has size 1: a single number for each index
    scalar_per: ClassVar[bool] = False
    #: the length of the axis is a multiple of this
    multiple: ClassVar[int] = 1

    @abstractmethod
    def element_shape(self, n: int) -> tuple[int, ...]:
        """The shape of one element on an axis of length n."""

    @abstractmethod
    def dimension(self, n: int) -> int:
        """The dimension of the algebra on an axis of length n (0 for a discrete group)."""

    @abstractmethod
    def apply(self, g: Tensor, rows: Tensor, dual: bool) -> Tensor:
        """The action on row vectors: g (*batch, ...) on rows (*batch, m, n)."""

    @abstractmethod
    def identity(
        self,
        n: int,
        batch: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The identity, (*batch, *element_shape(n))."""

    @abstractmethod
    def draw(
        self,
        n: int,
        batch: tuple[int, ...],
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Tensor:
        """Random elements; `random` is the public spelling with defaults."""

    @abstractmethod
    def inverse(self, g: Tensor) -> Tensor:
        """The inverse of each element."""

    @abstractmethod
    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        """The product g h: h acts first, then g."""

    @abstractmethod
    def algebra(self, coefficients: Tensor, n: int) -> Tensor:
        """A linear isomorphism from coordinates (*batch, dimension(n)) to algebra elements."""

    @abstractmethod
    def orbit_dimension(self, plain: Tensor, dual: Tensor) -> int:
        """Dimension of the orbit through plain and dual rows, both (*batch, m, n), summed over batch."""

    def act(self, g: Tensor, x: Tensor, axis: int = -1, dual: bool = False) -> Tensor:
        """Act with g on one axis of x.

        g: (*batch, *element_shape(n)). x: its axis `axis` has length n, its other axes begin with `batch`,
        the others are acted on alike. With `dual`, acts by the inverse transpose. The dtype of x is kept.

        >>> from symgeo.groups import Permutation
        >>> Permutation().act(torch.tensor([2, 0, 1]), torch.tensor([10, 20, 30]))
        tensor([30, 10, 20])
        """
        n = x.shape[axis]
        copies = g.dim() - len(self.element_shape(n))
        moved = x.movedim(axis, -1)
        batch = moved.shape[:copies]
        if copies < 0 or moved.dim() <= copies or tuple(g.shape) != (*batch, *self.element_shape(n)):
            raise SymmetryError(
                f"an element of {type(self).__name__} on axis {axis} of a tensor of shape {tuple(x.shape)}"
                f" needs shape (*batch, {', '.join(map(str, self.element_shape(n)))}), with batch the first"
                f" of the other axes; found {tuple(g.shape)}"
            )
        rows = moved.reshape(*batch, -1, n) if x.numel() else moved.new_zeros(*batch, 0, n)
        return self.apply(g, rows, dual).reshape(moved.shape).movedim(-1, axis)

    def vertical(self, xi: Tensor, x: Tensor, axis: int = -1, dual: bool = False) -> Tensor:
        """The infinitesimal action d/dt act(exp(t xi), x) at t = 0, shaped like x; derived from `act`.

        >>> from symgeo.groups import PositiveScaling
        >>> PositiveScaling().vertical(torch.tensor([1., 2.]), torch.tensor([5., 7.]), dual=True)
        tensor([ -5., -14.])
        """
        if self.discrete:
            return torch.zeros_like(x)
        n = x.shape[axis]
        batch = tuple(xi.shape[: xi.dim() - len(self.element_shape(n))])
        one = self.identity(n, batch, dtype=xi.real.dtype, device=xi.device)
        tangent: Tensor = torch.func.jvp(lambda g: self.act(g, x, axis, dual), (one,), (xi,))[1]
        return tangent

    def random(
        self,
        n: int,
        batch: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Random elements (*batch, *element_shape(n)), far from the identity and well conditioned.

        Numbers are drawn on the generator's device and then moved, so that a seed means the same everywhere.
        `dtype` is a real floating dtype (default: torch's default).
        """
        return self.draw(n, tuple(batch), generator, dtype or torch.get_default_dtype(), device)

    def random_algebra(
        self,
        n: int,
        batch: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Random algebra elements: standard normal coordinates."""
        shape = (*batch, self.dimension(n))
        return self.algebra(sampling.normal(shape, generator, dtype or torch.get_default_dtype(), device), n)

    def basis(
        self, n: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """A basis of the algebra, (dimension(n), *element_shape(n)).

        >>> from symgeo.groups import Orthogonal
        >>> Orthogonal().basis(2)
        tensor([[[ 0., -1.],
                 [ 1.,  0.]]])
        """
        return self.algebra(torch.eye(self.dimension(n), dtype=dtype, device=device), n)


def nonzero_columns(plain: Tensor, dual: Tensor) -> Tensor:
    """Which coordinates some row uses: plain (*batch, m, n), dual (*batch, k, n) -> bool (*batch, n)."""
    return (plain != 0).any(-2) | (dual != 0).any(-2)
