"""The dense blocks of all parameters, collected by shape and structure, with one plan for each collection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from symgeo.curvature.nodes import Occurrence, descendants, find_nodes, find_occurrences
from symgeo.curvature.plan import Final, Plan
from symgeo.symmetry import Action, assemble, split
from symgeo.symmetry.layout import block_dims

#: (name of a group, label) pairs; empty for the trivial kind
KindKey = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Leaf:
    """One block of a parameter, with the names of the groups that act on it by their rank in its plan."""

    parameter: str
    index: int
    names: tuple[str, ...]

    def key(self, final: Final) -> KindKey:
        """The kind of one output of the plan."""
        return tuple((self.names[rank], label) for rank, label in final.labels)

    def owners(self, final: Final) -> tuple[frozenset[tuple[str, int]], ...]:
        """What numbers the kinds of one output."""
        return tuple(frozenset((self.names[rank], place) for rank, place in axis) for axis in final.owners)


@dataclass
class Collection:
    """Leaves that one plan splits in one call."""

    plan: Plan
    leaves: list[Leaf]


class Leaves:
    """All parameters that are not frozen, as collections of blocks, and back.

    Raises SymmetryError naming parameter and group for what is not covered.
    """

    def __init__(self, action: Action, compact: bool) -> None:
        self.layouts = action.layouts
        self.shapes = {name: shape for name, shape in action.shapes.items() if name not in action.frozen}
        nodes = find_nodes(action, compact)
        occurrences = find_occurrences(action, nodes)
        self._counts: dict[str, int] = {}
        found: dict[object, Collection] = {}
        self._places: dict[tuple[str, int], tuple[Collection, int]] = {}
        for name in self.shapes:
            for index, shape in enumerate(self._block_shapes(name)):
                here = occurrences.get((name, index), []) if prod(shape) else []
                names, local = _localised(here)
                signature = (shape if here else (prod(shape),), _describe(local))
                if signature not in found:
                    found[signature] = Collection(Plan(signature[0], local, f"parameter {name!r}"), [])
                collection = found[signature]
                self._places[name, index] = collection, len(collection.leaves)
                collection.leaves.append(Leaf(name, index, names))
        self.collections = list(found.values())

    def _block_shapes(self, name: str) -> list[tuple[int, ...]]:
        dims = block_dims(self.layouts[name]) if name in self.layouts else None
        shapes = [tuple(d.size for d in block) for block in dims] if dims else [self.shapes[name]]
        self._counts[name] = len(shapes)
        return shapes

    def places(self) -> list[tuple[int, int]]:
        """For all blocks in the order of the parameters: the number of the collection, and the number in it."""
        numbers = {id(collection): i for i, collection in enumerate(self.collections)}
        return [(numbers[id(collection)], k) for collection, k in self._places.values()]

    def gather(self, params: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The blocks of every collection, (K, *shape)."""
        blocks = {
            name: split(self.layouts[name], params[name]) if name in self.layouts else [params[name]]
            for name in self.shapes
        }
        result = []
        for collection in self.collections:
            shape = collection.plan.shape
            found = [blocks[leaf.parameter][leaf.index].reshape(shape).to(dtype) for leaf in collection.leaves]
            result.append(torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0))
        return result

    def scatter(self, stacks: list[Tensor]) -> dict[str, Tensor]:
        """The inverse of `gather`."""
        blocks: dict[str, list[Tensor]] = {name: [] for name in self.shapes}
        numbers = {id(collection): stack for collection, stack in zip(self.collections, stacks)}
        for (name, _), (collection, k) in self._places.items():
            blocks[name].append(numbers[id(collection)][k])
        return {name: self._join(name, parts) for name, parts in blocks.items()}

    def _join(self, name: str, parts: list[Tensor]) -> Tensor:
        if name not in self.layouts:
            return parts[0].reshape(self.shapes[name])
        shaped = [part.reshape(shape) for part, shape in zip(parts, self._block_shapes(name))]
        return assemble(self.layouts[name], shaped).reshape(self.shapes[name])


def _localised(occurrences: list[Occurrence]) -> tuple[tuple[str, ...], list[Occurrence]]:
    """The names of the groups in their order, and the same occurrences with their place in it as rank and name.

    So blocks that differ in nothing but the names of their groups have equal plans.
    """
    nodes = sorted({o.node for o in descendants(occurrences)}, key=lambda node: node.rank)
    ranks = {node: i for i, node in enumerate(nodes)}

    def local(o: Occurrence) -> Occurrence:
        node = type(o.node)(o.node.name, o.node.kind, ranks[o.node])
        return Occurrence(node, o.position, o.free, [local(child) for child in o.inside])

    return tuple(node.name for node in nodes), [local(o) for o in occurrences]


def _describe(occurrences: list[Occurrence]) -> object:
    """What decides a plan, as a value to compare."""
    return tuple((o.position, o.node.rank, o.node.kind, o.free, _describe(o.inside)) for o in occurrences)
