"""What every transform of axes states: where its outputs live, forward, inverse, and how diagonals spread.

A transform acts on the trailing dimensions of a tensor (its slots), isometrically: the squared norms of all outputs
together are that of the input.  Each output is one real or complex tensor that spans one or more irreducible
representations; what it means is said by an `Output`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class OutAxis:
    """One trailing dimension of an output.

    Attributes
    ----------
    role: "copy" (numbers equivalent representations), "batch" (numbers different kinds), "coordinate" (inside one
        representation), or "open" (another transform follows)
    size: its length
    owner: which participant it belongs to; place: its number among the owner's axes of this role
    slot: for an open axis, the slot that it is
    """

    role: str
    size: int
    owner: int = 0
    place: int = 0
    slot: int = -1


@dataclass(frozen=True)
class Output:
    """One output of a transform.

    Attributes
    ----------
    labels: (participant, label) pairs; none if the group acts trivially
    axes: its trailing dimensions
    dimension: the factor by which it multiplies the dimension of a representation
    complexifies: whether a real input becomes complex here
    """

    labels: tuple[tuple[int, str], ...]
    axes: tuple[OutAxis, ...] = ()
    dimension: int = 1
    complexifies: bool = False


class Transform(Protocol):
    """An isometric change of basis of the trailing axes."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What comes out, in order."""
        ...

    @property
    def exact(self) -> bool:
        """Whether it computes nothing, so that no rounding error arises."""
        ...

    def forward(self, x: Tensor) -> list[Tensor]:
        """(..., *slots) -> (..., *axes) for every output."""
        ...

    def inverse(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `forward` on its image."""
        ...

    def spread(self, parts: list[Tensor]) -> Tensor:
        """The diagonal of sum_c t_c P_c, P_c the projection on copy c: (..., *axes without coordinates) -> slots."""
        ...


@dataclass(frozen=True)
class Keep:
    """An axis (..., n) that is irreducible as it is: the vectors of O(n), and whatever a permutation moves."""

    size: int
    label: str = "V"
    dimension: int = 1

    exact = True

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The axis itself, as coordinates."""
        labels = ((0, self.label),) if self.label else ()
        return (Output(labels, (OutAxis("coordinate", self.size),), self.dimension),)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x"""
        return [x]

    def inverse(self, parts: list[Tensor]) -> Tensor:
        """x"""
        return parts[0]

    def spread(self, parts: list[Tensor]) -> Tensor:
        """Constant along the axis."""
        return parts[0].unsqueeze(-1).expand(*parts[0].shape, self.size)
