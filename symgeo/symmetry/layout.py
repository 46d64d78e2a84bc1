"""A pattern with its sizes: how a tensor falls apart into dense blocks, and how it is put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from symgeo.symmetry.pattern import Product, Sum, Tree


class Sized(Protocol):
    """A leaf that knows its length."""

    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class Dim:
    """One dimension of a block: a factor (or `_`, with name None) of tensor axis `axis`."""

    name: str | None
    dual: bool
    size: int
    axis: int

    def __str__(self) -> str:
        return f"{self.name or '_'}{'*' * self.dual}:{self.size}"


S = TypeVar("S", bound=Sized)
Layout = tuple[Tree[Dim], ...]


def size(node: Tree[S]) -> int:
    """The length of an axis: the product over factors, the sum over slices."""
    if isinstance(node, Product):
        return prod(size(part) for part in node.parts)
    if isinstance(node, Sum):
        return sum(size(part) for part in node.parts)
    return node.size


def block_dims(layout: Sequence[Tree[S]]) -> list[tuple[S, ...]]:
    """The dimensions of every block, in the order of `split`.

    >>> q, k, d = Dim("q", False, 2, 0), Dim("k", False, 3, 0), Dim(None, False, 5, 1)
    >>> block_dims((Sum((q, k)), d)) == [(q, d), (k, d)]
    True
    """
    place = _first_node(layout)
    if place is None:
        return [tuple(layout)]  # type: ignore[arg-type]
    return [dims for branch in _branches(layout, place) for dims in block_dims(branch)]


def split(layout: Sequence[Tree[S]], x: Tensor) -> list[Tensor]:
    """The dense blocks of x, as views: products unflattened, sums cut into slices.

    >>> h, w, v = Dim("h", False, 2, 0), Dim("w", False, 1, 0), Dim("v", False, 2, 0)
    >>> [b.tolist() for b in split((Product((h, Sum((w, v)))),), torch.arange(6))]
    [[[0], [3]], [[1, 2], [4, 5]]]
    """
    place = _first_node(layout)
    if place is None:
        return [x]
    node = layout[place]
    if isinstance(node, Product):
        pieces: Sequence[Tensor] = [x.unflatten(place, [size(part) for part in node.parts])]
    else:
        pieces = x.split([size(part) for part in node.parts], dim=place)  # type: ignore[union-attr]
    branches = zip(_branches(layout, place), pieces)
    return [block for branch, piece in branches for block in split(branch, piece)]


def assemble(layout: Sequence[Tree[S]], blocks: Sequence[Tensor]) -> Tensor:
    """The inverse of `split`, out of place."""
    return _assemble(layout, iter(blocks))


def _assemble(layout: Sequence[Tree[S]], blocks: Iterator[Tensor]) -> Tensor:
    place = _first_node(layout)
    if place is None:
        return next(blocks)
    node = layout[place]
    pieces = [_assemble(branch, blocks) for branch in _branches(layout, place)]
    if isinstance(node, Product):
        return pieces[0].flatten(place, place + len(node.parts) - 1)
    return torch.cat(pieces, dim=place)


def _first_node(layout: Sequence[Tree[S]]) -> int | None:
    """The position of the first axis that is not yet a single dimension."""
    return next((i for i, node in enumerate(layout) if isinstance(node, Product | Sum)), None)


def _branches(layout: Sequence[Tree[S]], place: int) -> list[tuple[Tree[S], ...]]:
    """The layouts after one step at `place`: one for a product, one for each slice of a sum."""
    node, before, after = layout[place], tuple(layout[:place]), tuple(layout[place + 1 :])
    if isinstance(node, Product):
        return [before + node.parts + after]
    assert isinstance(node, Sum)
    return [(*before, part, *after) for part in node.parts]
