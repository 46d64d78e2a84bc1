"""Which shifts go with which groups: a group must map translations of a shift to such translations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from symgeo.errors import SymmetryError
from symgeo.groups import Group, Permutation
from symgeo.symmetry.blocks import Block
from symgeo.symmetry.layout import Dim, Layout, block_dims, size
from symgeo.symmetry.pattern import Product, Sum, Tree, leaves, map_leaves
from symgeo.symmetry.shifts import ShiftDim, Translation


def check_normalised(
    name: str,
    shift: Translation,
    layouts: Mapping[str, Layout],
    groups: Mapping[str, Group],
    blocks: Mapping[str, Sequence[Block]],
) -> None:
    """Raise SymmetryError unless every group maps translations of this shift to translations of this shift.

    Otherwise the elements would not compose: act g, then shift, then act g^-1 must again be a shift.
    """
    for parameter, translation in shift.layouts.items():
        if parameter not in layouts:
            continue
        refined = [_refine(own, node, groups) for own, node in zip(layouts[parameter], translation)]
        if any(node is None for node in refined):
            raise SymmetryError(
                f"shift {name!r} cuts parameter {parameter!r} at other places than its own pattern, on whose"
                " slices groups act; write the shift with the same slices"
            )
        kinds = block_dims([node for node in refined if node is not None])
        here = ((group, block) for group in groups for block in blocks[group] if block.parameter == parameter)
        for group, block in here:
            if not _maps_to_itself(block, kinds[block.index], groups[group]):
                raise SymmetryError(
                    f"shift {name!r} is constant along an axis of parameter {parameter!r} on which group"
                    f" {group!r} ({type(groups[group]).__name__}) acts, so that the two do not compose;"
                    " make the shift free there, or leave one of them out"
                )


def _maps_to_itself(block: Block, kinds: Sequence[ShiftDim], group: Group) -> bool:
    if any(dim.kind == "zero" for dim in kinds):
        return True
    if kinds[block.position].kind == "constant":
        return isinstance(group, Permutation) or kinds[block.position].size == 1
    return all(kinds[i].kind == "free" for i in block.copies)


def _refine(own: Tree[Dim], node: Tree[ShiftDim], groups: Mapping[str, Group]) -> Tree[ShiftDim] | None:
    """The shift's axis written on the leaves of the parameter's own axis; None if it cannot be."""
    if isinstance(own, Product | Sum) and isinstance(node, type(own)):
        if [size(part) for part in own.parts] == [size(part) for part in node.parts]:
            parts = [_refine(a, b, groups) for a, b in zip(own.parts, node.parts)]
            known = [part for part in parts if part is not None]
            return type(own)(tuple(known)) if len(known) == len(parts) else None
    kinds = {leaf.kind for leaf in leaves(node)}
    if len(kinds) > 1 and any(leaf.name in groups for leaf in leaves(own)):
        return None
    kind = "constant" if "constant" in kinds else "free" if "free" in kinds else "zero"
    return map_leaves(own, lambda leaf: ShiftDim(kind, leaf.size))
