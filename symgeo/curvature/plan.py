"""The sequence of transforms for all blocks of one shape and structure, run on all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from symgeo.curvature.builder import Axis, Builder, Label, Owner, Piece, Step
from symgeo.curvature.nodes import Occurrence
from symgeo.curvature.transform import Keep

_ROLES = ("batch", "copy", "coordinate")


@dataclass(frozen=True)
class Final:
    """One output of a plan, (K, B, M, D) for K blocks: B kinds, M copies, D coordinates.

    labels: (rank of a group, label) pairs, none for the trivial kind; owners: of the batch axes;
    dimension: of the irreducible representation over the reals; complex: whether the coordinates are complex.
    """

    piece: Piece
    order: tuple[Axis, ...]

    @property
    def labels(self) -> tuple[Label, ...]:
        """In the order of the groups."""
        return tuple(sorted(self.piece.labels))

    @property
    def owners(self) -> tuple[tuple[Owner, ...], ...]:
        """The owners of every batch axis."""
        return tuple(axis.owners for axis in self.order if axis.role == "batch")

    def size(self, role: str) -> int:
        """The product of the axes of one role."""
        return prod(axis.size for axis in self.order if axis.role == role)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, M, D)"""
        batch, copies, coordinates = (self.size(role) for role in _ROLES)
        return batch, copies, coordinates


class Plan:
    """How blocks of one shape, on which groups act in one way, split into kinds."""

    def __init__(self, shape: tuple[int, ...], occurrences: list[Occurrence], where: str) -> None:
        builder = Builder(shape, occurrences, where)
        self.shape, self.steps = shape, builder.steps
        self.finals = [_final(piece) for piece in builder.pieces]

    @property
    def exact(self) -> bool:
        """Whether nothing is added or subtracted, so that zeros stay zeros."""
        return all(isinstance(step.transform, Keep) or step.transform.exact for step in self.steps)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Blocks (K, *shape) -> one tensor (K, B, M, D) for every final."""
        tensors: dict[int, Tensor] = {0: x}
        for step in self.steps:
            source = tensors.pop(step.source)
            parts = step.transform.forward(source.permute(_slots_last(step, step.axes)))
            tensors.update(zip(step.outputs, parts))
        return [
            tensors[f.piece.source].permute(_permutation(f.piece.axes, f.order)).reshape(x.shape[0], *f.shape)
            for f in self.finals
        ]

    def inverse(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `forward`."""
        return self._back(parts, spread=False)

    def spread(self, parts: Sequence[Tensor]) -> Tensor:
        """The diagonal of sum_c t_c P_c over all finals and copies c, P_c the projection: (K, B, M) -> (K, *shape)."""
        return self._back(parts, spread=True)

    def _back(self, parts: Sequence[Tensor], spread: bool) -> Tensor:
        """From the last step to the first; a diagonal has no coordinates until its step spreads it."""

        def seen(axes: Sequence[Axis]) -> list[Axis]:
            return [axis for axis in axes if not (spread and axis.role == "coordinate")]

        tensors: dict[int, Tensor] = {}
        for final, part in zip(self.finals, parts):
            order = seen(final.order)
            unflat = part.reshape(part.shape[0], *(axis.size for axis in order))
            tensors[final.piece.source] = unflat.permute(_permutation(order, seen(final.piece.axes)))
        for step in reversed(self.steps):
            outputs = [tensors.pop(i) for i in step.outputs]
            joined = step.transform.spread(outputs) if spread else step.transform.inverse(outputs)
            forward = _slots_last(step, seen(step.axes))
            tensors[step.source] = joined.permute([forward.index(i) for i in range(len(forward))])
        return tensors[0]


def _final(piece: Piece) -> Final:
    """The order in which the axes of a finished piece are laid out; what is still open is free."""
    order = [
        axis
        for role in _ROLES
        for axis in sorted(
            (a for a in piece.axes if a.role == role or (role == "copy" and a.role == "open")),
            key=lambda a: a.owners,
        )
    ]
    named = [Axis(a.id, a.size, "copy", a.owners) if a.role == "open" else a for a in order]
    return Final(piece, tuple(named))


def _permutation(axes: Sequence[Axis], order: Sequence[Axis]) -> list[int]:
    """The permutation, with the leading axis, that brings axes into an order."""
    places = {axis.id: i + 1 for i, axis in enumerate(axes)}
    return [0, *(places[axis.id] for axis in order)]


def _slots_last(step: Step, axes: Sequence[Axis]) -> list[int]:
    """The permutation, with the leading axis, that brings the slots of a step last."""
    places = {axis.id: i + 1 for i, axis in enumerate(axes)}
    return [0, *(places[axis.id] for axis in axes if axis.id not in step.slots), *(places[i] for i in step.slots)]
