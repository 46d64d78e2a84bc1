"""Which compact groups a bound symmetry averages over, and where each of them occurs in a block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from symgeo.errors import SymmetryError
from symgeo.groups import (
    Cyclic,
    GeneralLinear,
    Group,
    Orthogonal,
    Permutation,
    PositiveScaling,
    Rotary,
    SignFlip,
)
from symgeo.symmetry import Action, Dim

#: the reason for which a group has no average
_REASONS: dict[type[Group], str] = {
    GeneralLinear: "invertible matrices are not compact: their maximal compact subgroup is O(n)",
    PositiveScaling: "positive scalings are not compact: their maximal compact subgroup is trivial",
    Rotary: "scaled rotations are not compact: their maximal compact subgroup is U(1) for each plane",
}


@dataclass(frozen=True)
class Node:
    """A group that is averaged over.

    Attributes
    ----------
    name: of the group
    kind: "permutation", "vector" (all orthogonal matrices), "signs", "cyclic", or the pairing of the planes of
        U(1): "half" or "interleaved"
    rank: its place in the order in which groups are treated
    """

    name: str
    kind: str
    rank: int


@dataclass
class Occurrence:
    """One dimension of a block on which a node acts.

    Attributes
    ----------
    node, position: the group, and the dimension on which it acts
    free: the dimensions without a group that number its elements
    inside: what acts within each index of this dimension: occurrences of groups that are `per` this one
    """

    node: Node
    position: int
    free: tuple[int, ...]
    inside: list[Occurrence] = field(default_factory=list)


def find_nodes(action: Action, compact: bool) -> dict[str, Node]:
    """The compact group behind every group of an action, in the order of declaration.

    With `compact`, GeneralLinear becomes O(n), Rotary U(1) for each plane, and PositiveScaling nothing.
    Raises SymmetryError for a group without an average.
    """
    if not compact:
        for name, group in action.groups.items():
            if type(group) in _REASONS:
                raise SymmetryError(
                    f"group {name!r} ({type(group).__name__}) has no average: {_REASONS[type(group)]};"
                    " pass compact=True to average over that subgroup in the balanced gauge"
                )
        for name in action.flows:
            raise SymmetryError(
                f"flow {name!r} has no average: it is a shear, whose maximal compact subgroup is trivial;"
                " pass compact=True to leave it out"
            )
    names = [name for name, group in action.groups.items() if not isinstance(group, PositiveScaling)]
    parents = {group.per for name, group in action.groups.items() if name in names}
    return {
        name: Node(name, _kind(name, action.groups[name], action, name in parents), rank)
        for rank, name in enumerate(names)
    }


def _kind(name: str, group: Group, action: Action, parent: bool) -> str:
    if isinstance(group, Permutation):
        return "permutation"
    if isinstance(group, Orthogonal | GeneralLinear):
        return "vector"
    if isinstance(group, SignFlip):
        # one sign for each unit is O(1)
        inside = action.sizes[name] == 1 and group.per in action.groups and not parent
        return "vector" if inside else "signs"
    if isinstance(group, Cyclic):
        return "cyclic"
    if isinstance(group, Rotary):
        return group.pairing
    raise SymmetryError(f"group {name!r}: averages over {type(group).__name__} are not known")


def find_occurrences(action: Action, nodes: Mapping[str, Node]) -> dict[tuple[str, int], list[Occurrence]]:
    """For every (parameter, index of the block) the occurrences of the outermost groups."""
    found: dict[tuple[str, int], dict[int, Occurrence]] = {}
    parents: dict[tuple[str, int], dict[int, int | None]] = {}
    for name, node in nodes.items():
        for block in action.blocks(name):
            parent, free = _chain(block.copies, block.dims, nodes)
            place = (block.parameter, block.index)
            found.setdefault(place, {})[block.position] = Occurrence(node, block.position, free)
            parents.setdefault(place, {})[block.position] = parent
    outer: dict[tuple[str, int], list[Occurrence]] = {}
    for place, here in found.items():
        outer[place] = []
        for position in sorted(here):
            parent = parents[place][position]
            (outer[place] if parent is None else here[parent].inside).append(here[position])
    return outer


def _chain(
    copies: tuple[int, ...], dims: tuple[Dim, ...], nodes: Mapping[str, Node]
) -> tuple[int | None, tuple[int, ...]]:
    """The dimension of the next outer group, and the dimensions without a group inside of it."""
    for i in reversed(range(len(copies))):
        if dims[copies[i]].name in nodes:
            return copies[i], copies[i + 1 :]
    return None, copies


def descendants(occurrences: Iterable[Occurrence]) -> list[Occurrence]:
    """Occurrences with all that lies inside of them."""
    return [o for top in occurrences for o in (top, *descendants(top.inside))]


def by_node(occurrences: Iterable[Occurrence]) -> list[list[Occurrence]]:
    """Occurrences collected by their group, in the order of the groups."""
    groups: dict[int, list[Occurrence]] = {}
    for occurrence in occurrences:
        groups.setdefault(occurrence.node.rank, []).append(occurrence)
    return [groups[rank] for rank in sorted(groups)]
