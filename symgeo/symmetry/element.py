"""Elements of a bound symmetry, and elements of its algebra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Element(Mapping[str, Tensor]):
    """A read-only mapping from group (or shift) name to tensor; a missing name stands for the identity.

    A group with copies has its `per` dimensions first: GeneralLinear(per="H") holds (H, n, n). A shift holds
    one flat vector. Algebra elements are the same mapping with tangents in place of elements.

    >>> import torch
    >>> Element({"e": torch.eye(2)})
    Element(e: (2, 2))
    """

    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"Element({', '.join(f'{name}: {tuple(x.shape)}' for name, x in self.tensors.items())})"
