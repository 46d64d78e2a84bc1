"""The elements of a bound symmetry: the identity, random ones, and those that a user writes down."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from symgeo.errors import SymmetryError
from symgeo.groups import Group, Permutation
from symgeo.groups.sampling import normal
from symgeo.symmetry.element import Element, checked


@dataclass(frozen=True)
class Elements:
    """What an element consists of: one tensor for every group, one flat vector for every shift and flow.

    sizes, copies: of every group; coordinates: the number of coordinates of every shift and flow.
    """

    groups: Mapping[str, Group]
    sizes: Mapping[str, int]
    copies: Mapping[str, tuple[int, ...]]
    coordinates: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device

    def identity(self) -> Element:
        """The identity, with all its parts."""
        tensors = {
            name: group.identity(self.sizes[name], self.copies[name], self.dtype, self.device)
            for name, group in self.groups.items()
        }
        zeros = torch.zeros((), dtype=self.dtype, device=self.device)
        return Element(tensors | {name: zeros.repeat(n) for name, n in self.coordinates.items()})

    def random(self, generator: torch.Generator | None, only: Collection[str] | None) -> Element:
        """Every part, or those in `only`, drawn at random."""
        tensors = {
            name: group.random(self.sizes[name], self.copies[name], generator, self.dtype, self.device)
            for name, group in self.groups.items()
            if only is None or name in only
        }
        return Element(tensors | self._normal(generator, only))

    def random_algebra(self, generator: torch.Generator | None) -> Element:
        """Standard normal coordinates for everything continuous."""
        tensors = {
            name: group.random_algebra(self.sizes[name], self.copies[name], generator, self.dtype, self.device)
            for name, group in self.groups.items()
            if not group.discrete
        }
        return Element(tensors | self._normal(generator, None))

    def part(self, name: str, x: Tensor) -> Tensor:
        """One part of an element, checked, in the precision in which elements are drawn."""
        if name in self.coordinates:
            return checked(name, x, (self.coordinates[name],), self.dtype).to(self.device)
        group = self.groups[name]
        needed = (*self.copies[name], *group.element_shape(self.sizes[name]))
        dtype = None if isinstance(group, Permutation) else self.dtype
        return checked(name, x, needed, dtype).to(self.device)

    def check_names(self, g: Mapping[str, Tensor]) -> None:
        """Raise SymmetryError for a part that no element has."""
        for name in g:
            if name not in self.groups and name not in self.coordinates:
                known = ", ".join([*self.groups, *self.coordinates]) or "none"
                raise SymmetryError(f"an element has no part {name!r}; its parts are {known}")

    def _normal(self, generator: torch.Generator | None, only: Collection[str] | None) -> dict[str, Tensor]:
        return {
            name: normal((n,), generator, self.dtype, self.device)
            for name, n in self.coordinates.items()
            if only is None or name in only
        }
