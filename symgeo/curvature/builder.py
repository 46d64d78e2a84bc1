"""From the occurrences of groups in a block to the sequence of transforms that splits it into kinds.

The groups of one unit act like a wreath product: what lies inside one index of a permuted axis is transformed
first.  Where the inner groups act trivially the outer permutation acts on a plain axis; where they do not, the axis
and what is inside are one irreducible axis, because the inner elements of different indices are independent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from symgeo.curvature.abelian import Cyclic, Planes, SignPairs, Skew
from symgeo.curvature.cells import EqualCells, HalfCells, Matrix, UnequalCells
from symgeo.curvature.nodes import Node, Occurrence, by_node
from symgeo.curvature.permuted import Centre, OffDiagonal, Split
from symgeo.curvature.transform import Keep, OutAxis, Transform
from symgeo.errors import SymmetryError

Owner = tuple[int, int]  # rank of a group, number of the axis among the group's axes of this role
Label = tuple[int, str]  # rank of a group, label


@dataclass(frozen=True)
class Axis:
    """One dimension of a tensor on its way: its role as in `OutAxis` ("open" until the end means free)."""

    id: int
    size: int
    role: str = "open"
    owners: tuple[Owner, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A tensor on its way: where it is, its axes after the leading one, and what is known of its kind."""

    source: int
    axes: tuple[Axis, ...]
    labels: tuple[Label, ...] = ()
    dimension: int = 1
    complex: bool = False

    def axis(self, identity: int) -> Axis:
        """The axis of this id."""
        return next(axis for axis in self.axes if axis.id == identity)

    def relabelled(self, identities: Iterable[int], owners: Iterable[Owner]) -> Piece:
        """With these axes as batch axes."""
        new = dict(zip(identities, owners))
        axes = (
            replace(a, role="batch", owners=(*a.owners, new[a.id])) if a.id in new else a for a in self.axes
        )
        return replace(self, axes=tuple(axes))


@dataclass(frozen=True)
class Step:
    """One transform: `slots` of the source's axes to several tensors; the other axes come first, in order."""

    source: int
    transform: Transform
    axes: tuple[Axis, ...]
    slots: tuple[int, ...]
    outputs: tuple[int, ...]


class Builder:
    """Collects the steps for blocks of one shape and one structure.

    The ids of the axes of the block are its dimensions.  `where` names the block in error messages.
    """

    def __init__(self, shape: tuple[int, ...], occurrences: list[Occurrence], where: str) -> None:
        self.where = where
        self.steps: list[Step] = []
        self._tensors, self._ids = 1, len(shape)
        pieces = [Piece(0, tuple(Axis(i, size) for i, size in enumerate(shape)))]
        for same in by_node(occurrences):
            pieces = [part for piece in pieces for part in self._group(piece, same)]
        self.pieces = pieces

    def _group(self, piece: Piece, same: list[Occurrence]) -> list[Piece]:
        """All occurrences of one group in one place."""
        if len(same) > 2:
            self._fail(same[0].node, f"acts on {len(same)} axes; at most two axes of one group are covered")
        if len(same) == 2 and any(o.inside for o in same) and same[0].node.kind != "permutation":
            self._fail(same[0].node, "acts on two axes, and other groups are per its index")
        kind = same[0].node.kind
        if kind == "permutation":
            return self._cell(piece, same[0], same[0].inside) if len(same) == 1 else self._pairs(piece, *same)
        if kind == "vector":
            return self._vectors(piece, same)
        if kind == "signs":
            return self._signs(piece, same)
        if kind == "cyclic":
            return self._cyclic(piece, same)
        return self._planes(piece, same)

    def _inside(self, piece: Piece, inside: list[Occurrence]) -> list[Piece]:
        pieces = [piece]
        for same in by_node(inside):
            pieces = [part for p in pieces for part in self._group(p, same)]
        return pieces

    def _cell(self, piece: Piece, outer: Occurrence, inside: list[Occurrence]) -> list[Piece]:
        """A permuted axis with the groups inside each of its indices."""
        node, at, size = outer.node, outer.position, piece.axis(outer.position).size
        result: list[Piece] = []
        for part in self._inside(piece, inside):
            if part.labels == piece.labels:
                result += self._apply(part, Centre(size), [at], [node], outer.free)
            else:
                result += self._apply(part, Keep(size, "", size), [at], [node], outer.free, moved=True)
        return result

    def _pairs(self, piece: Piece, row: Occurrence, column: Occurrence) -> list[Piece]:
        """Two axes of one permutation: the diagonal is a permuted axis, the rest pairs of different indices."""
        node, size = row.node, piece.axis(row.position).size
        self._same_copies([row, column])
        for o in (row, column):
            if len(o.inside) > 1 or any(child.node.kind != "vector" or child.inside for child in o.inside):
                self._fail(node, "acts on two axes, one of which carries more inside than one orthogonal group")
        cells = [*row.inside, *column.inside]
        at = [row.position, column.position]
        split = Split(size, tuple(piece.axis(c.position).size for c in cells))
        first, *rest = self._apply(piece, split, [*at, *(c.position for c in cells)], [node], ())
        result = self._cell(first, row, cells)
        for off in rest:
            result += self._off_diagonal(off, row, column)
        return result

    def _off_diagonal(self, piece: Piece, row: Occurrence, column: Occurrence) -> list[Piece]:
        size = piece.axis(row.position).size
        cells = [*row.inside, *column.inside]
        if not cells:
            at = [row.position, column.position]
            return self._apply(piece, OffDiagonal(size), at, [row.node], row.free)
        if len(cells) == 2 and cells[0].node.rank > cells[1].node.rank:
            row, column, cells = column, row, cells[::-1]
        if not row.inside:
            row, column = column, row
        slots = [row.position, column.position, *(c.position for c in cells)]
        sizes = [piece.axis(c.position).size for c in cells]
        transform: Transform = HalfCells(size, sizes[0])
        if len(cells) == 2:
            same = cells[0].node == cells[1].node
            transform = EqualCells(size, sizes[0]) if same else UnequalCells(size, (sizes[0], sizes[1]))
        nodes = [row.node, *dict.fromkeys(c.node for c in cells)]
        return self._apply(piece, transform, slots, nodes, row.free)

    def _vectors(self, piece: Piece, same: list[Occurrence]) -> list[Piece]:
        size = piece.axis(same[0].position).size
        if len(same) == 1:
            return self._apply(piece, Keep(size, "V", size), [same[0].position], [same[0].node], same[0].free)
        self._same_copies(same)
        slots = [o.position for o in same]
        return self._apply(piece, Matrix(size), slots, [same[0].node], same[0].free)

    def _signs(self, piece: Piece, same: list[Occurrence]) -> list[Piece]:
        node = same[0].node
        if len(same) == 1:
            at, free = same[0].position, same[0].free
            owners = [(node.rank, i) for i in range(len(free) + 1)]
            label = (node.rank, "sign")
            return [
                replace(p, labels=(*p.labels, label)).relabelled([*free, at], owners)
                for p in self._inside(piece, same[0].inside)
            ]
        one, other = ((*o.free, o.position) for o in same)
        if same[0].free == same[1].free:
            pairs = SignPairs((piece.axis(one[-1]).size,))
            return self._apply(piece, pairs, [one[-1], other[-1]], [node], same[0].free)
        if set(one) & set(other):
            self._fail(node, "acts on two axes with copies that are numbered by partly different dimensions")
        return self._apply(piece, SignPairs(tuple(piece.axis(i).size for i in one)), [*one, *other], [node], ())

    def _cyclic(self, piece: Piece, same: list[Occurrence]) -> list[Piece]:
        node, size = same[0].node, piece.axis(same[0].position).size
        slot = same[0].position
        if len(same) == 2:
            self._same_copies(same)
            (piece,) = self._apply(piece, Skew(size), [o.position for o in same], [node], ())
        return self._apply(piece, Cyclic(size, piece.complex), [slot], [node], same[0].free)

    def _planes(self, piece: Piece, same: list[Occurrence]) -> list[Piece]:
        node = same[0].node
        if len(same) == 2:
            self._fail(node, "acts on two axes; the planes of U(1) are covered on one")
        planes = Planes(piece.axis(same[0].position).size, node.kind, piece.complex)
        return self._apply(piece, planes, [same[0].position], [node], same[0].free)

    def _apply(
        self, piece: Piece, transform: Transform, slots: list[int], nodes: list[Node],
        free: tuple[int, ...], moved: bool = False,
    ) -> list[Piece]:
        """Append a step. `free` axes number different kinds wherever the group acts, which `moved` says if the
        labels do not."""
        kept = tuple(axis for axis in piece.axes if axis.id not in slots)
        start = self._tensors
        result = []
        for i, output in enumerate(transform.outputs):
            axes = tuple(self._axis(out, slots, nodes) for out in output.axes)
            labels = tuple((nodes[who].rank, label) for who, label in output.labels)
            part = Piece(
                start + i, (*kept, *axes), (*piece.labels, *labels),
                piece.dimension * output.dimension, piece.complex or output.complexifies,
            )
            if labels or moved:
                # places beyond the group's own axes
                part = part.relabelled(free, [(nodes[0].rank, 10 + j) for j in range(len(free))])
            result.append(part)
        self._tensors += len(result)
        outputs = tuple(part.source for part in result)
        self.steps.append(Step(piece.source, transform, piece.axes, tuple(slots), outputs))
        return result

    def _axis(self, out: OutAxis, slots: list[int], nodes: list[Node]) -> Axis:
        if out.role == "open":
            return Axis(slots[out.slot], out.size)
        self._ids += 1
        owners = () if out.role == "copy" else ((nodes[out.owner].rank, out.place),)
        return Axis(self._ids, out.size, out.role, owners)

    def _same_copies(self, same: list[Occurrence]) -> None:
        if len({o.free for o in same}) > 1:
            self._fail(same[0].node, "acts on two axes with copies that are numbered by different dimensions")

    def _fail(self, node: Node, problem: str) -> None:
        raise SymmetryError(
            f"{self.where}: group {node.name!r} {problem}; leave the group out, or declare one of the axes as `_`"
        )
