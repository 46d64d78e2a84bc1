"""Translations: flat directions that add a tensor, constant, free or zero along each axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NoReturn

import torch
from torch import Tensor

from symgeo.errors import SymmetryError
from symgeo.symmetry.layout import Dim, Layout, assemble, block_dims, size, split
from symgeo.symmetry.pattern import (
    Constant,
    Factor,
    Leaf,
    Pattern,
    Product,
    Sum,
    Tree,
    Zero,
)


@dataclass(frozen=True)
class ShiftDim:
    """One dimension of a block of a translation: "free", "constant" or "zero"."""

    kind: str
    size: int


ShiftLayout = tuple[Tree[ShiftDim], ...]
Fail = Callable[[str], NoReturn]


@dataclass(frozen=True)
class Translation:
    """One shift: an independent translation of each of its parameters, with coordinates in one flat vector.

    `layouts` maps each parameter to the layout of its translation.
    """

    layouts: dict[str, ShiftLayout]

    @property
    def dimension(self) -> int:
        """The number of coordinates."""
        return sum(self._count(parameter) for parameter in self.layouts)

    def expand(self, coordinates: Tensor) -> dict[str, Tensor]:
        """The translation of every parameter: (dimension,) -> tensors of the parameters' shapes."""
        chunks = coordinates.split([self._count(parameter) for parameter in self.layouts])
        return {parameter: _expand(layout, x) for (parameter, layout), x in zip(self.layouts.items(), chunks)}

    def extract(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `expand`."""
        return torch.cat([_extract(layout, tensors[parameter]) for parameter, layout in self.layouts.items()])

    def _count(self, parameter: str) -> int:
        return sum(prod(_coordinate_shape(dims)) for dims in block_dims(self.layouts[parameter]))


def _coordinate_shape(dims: Sequence[ShiftDim]) -> list[int]:
    """The shape of a block's coordinates; it has no elements if the block is not touched."""
    return [{"free": dim.size, "constant": 1, "zero": 0}[dim.kind] for dim in dims]


def _expand(layout: ShiftLayout, coordinates: Tensor) -> Tensor:
    blocks = []
    for dims in block_dims(layout):
        shape, full = _coordinate_shape(dims), [dim.size for dim in dims]
        values, coordinates = coordinates.split([prod(shape), len(coordinates) - prod(shape)])
        touched = all(dim.kind != "zero" for dim in dims)
        blocks.append(values.reshape(shape).expand(full) if touched else values.new_zeros(full))
    return assemble(layout, blocks)


def _extract(layout: ShiftLayout, x: Tensor) -> Tensor:
    parts = []
    for dims, block in zip(block_dims(layout), split(layout, x)):
        for axis, length in enumerate(_coordinate_shape(dims)):
            block = block.narrow(axis, 0, min(length, block.shape[axis]))
        parts.append(block.reshape(-1))
    return torch.cat(parts)


def bind_shift(
    name: str,
    patterns: Mapping[str, Pattern],
    shapes: Mapping[str, tuple[int, ...]],
    layouts: Mapping[str, Layout],
    sizes: Mapping[str, int],
) -> Translation:
    """Fit a shift's patterns to the shapes; slices are sized by the parameter's own layout or by names."""
    bound: dict[str, ShiftLayout] = {}
    for parameter, pattern in patterns.items():
        shape = shapes[parameter]

        def fail(reason: str, parameter: str = parameter, pattern: Pattern = pattern) -> NoReturn:
            raise SymmetryError(
                f"shift {name!r}, parameter {parameter!r} with pattern {str(pattern)!r}: {reason}"
            )

        if len(pattern.axes) != len(shape):
            fail(f"the pattern has {len(pattern.axes)} axes, the tensor {len(shape)} (shape {tuple(shape)})")
        like: Sequence[Tree[Dim] | None] = layouts.get(parameter) or [None] * len(shape)
        nodes = zip(pattern.axes, shape, like)
        bound[parameter] = tuple(_resolve(node, length, other, sizes, fail) for node, length, other in nodes)
    return Translation(bound)


def _resolve(
    node: Tree[Leaf], length: int, like: Tree[Dim] | None, sizes: Mapping[str, int], fail: Fail
) -> Tree[ShiftDim]:
    """Give every leaf its size; `like` is the node of the parameter's own pattern at the same place."""
    if not isinstance(node, Product | Sum):
        known = sizes.get(node.name, length) if isinstance(node, Factor) else length
        if known != length:
            fail(f"{node} has size {known}, but the axis has length {length} here")
        kind = "constant" if isinstance(node, Constant) else "zero" if isinstance(node, Zero) else "free"
        return ShiftDim(kind, length)
    others = _parts_like(node, like)
    lengths = [_lookup(part, other, sizes) for part, other in zip(node.parts, others)]
    known_lengths = [x for x in lengths if x is not None]
    if len(lengths) - len(known_lengths) > 1:
        fail(
            f"the sizes of {node} are ambiguous in an axis of length {length}; name the slices, or give the"
            " parameter a pattern with the same slices"
        )
    total = sum(known_lengths) if isinstance(node, Sum) else prod(known_lengths)
    if None in lengths:
        missing = length - total if isinstance(node, Sum) else length // max(total, 1)
        lengths[lengths.index(None)] = missing
        total = total + missing if isinstance(node, Sum) else total * missing
    if total != length or min(x for x in lengths if x is not None) < 0:
        fail(f"{node} has sizes {lengths}, which give {total}, but the axis has length {length}")
    parts = zip(node.parts, lengths, others)
    resolved = tuple(_resolve(part, x or 0, other, sizes, fail) for part, x, other in parts)
    return Product(resolved) if isinstance(node, Product) else Sum(resolved)


def _parts_like(node: Product[Leaf] | Sum[Leaf], like: Tree[Dim] | None) -> Sequence[Tree[Dim] | None]:
    if isinstance(like, type(node)) and len(like.parts) == len(node.parts):
        return like.parts
    return [None] * len(node.parts)


def _lookup(node: Tree[Leaf], like: Tree[Dim] | None, sizes: Mapping[str, int]) -> int | None:
    """The size of a part if it is known."""
    if like is not None:
        return size(like)
    if isinstance(node, Product | Sum):
        lengths = [_lookup(part, None, sizes) for part in node.parts]
        if None in lengths:
            return None
        known = [x for x in lengths if x is not None]
        return prod(known) if isinstance(node, Product) else sum(known)
    return sizes.get(node.name) if isinstance(node, Factor) else None
