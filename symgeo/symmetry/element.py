"""Elements of a bound symmetry, and elements of its algebra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from symgeo.errors import SymmetryError


@dataclass(frozen=True, eq=False, repr=False)
class Element(Mapping[str, Tensor]):
    """A read-only mapping from group (shift, flow) name to tensor; a missing name stands for the identity.

    A group with copies has its `per` dimensions first: GeneralLinear(per="H") holds (H, n, n). A shift or a flow
    holds one flat vector. Algebra elements are the same mapping with tangents in place of elements.

    Flows do not merge with the rest, so that a product with flows is a chain: `first` acts before `tensors`.

    >>> Element({"e": torch.eye(2)})
    Element(e: (2, 2))
    """

    tensors: dict[str, Tensor]
    first: tuple[Element, ...] = ()

    @property
    def stages(self) -> tuple[Element, ...]:
        """The elements without a chain of their own whose product this is, in the order in which they act."""
        return (*self.first, Element(self.tensors)) if self.first else (self,)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {tuple(x.shape)}" for name, x in self.tensors.items())
        after = f" after {len(self.first)} more" if self.first else ""
        return f"Element({parts}){after}"


def checked(name: str, x: Tensor, needed: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    """One part of an element in the given real precision; dtype None asks for permutations."""
    if tuple(x.shape) != needed:
        raise SymmetryError(f"element {name!r} needs shape {needed}, copies first; found {tuple(x.shape)}")
    if dtype is not None:
        return x.to(dtype.to_complex() if x.is_complex() else dtype)
    if not torch.equal(x.sort(-1).values, torch.arange(needed[-1], device=x.device).expand(needed)):
        raise SymmetryError(f"element {name!r} needs permutations of 0..{needed[-1] - 1} along its last axis")
    return x.long()
