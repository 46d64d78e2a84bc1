"""The blocks of an operator for a model of another size: equal kinds, equal copies, other dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from symgeo.curvature.assembly import Bucket
from symgeo.curvature.decomposition import Decomposition
from symgeo.curvature.dense import DenseBlock
from symgeo.curvature.leaves import KindKey
from symgeo.curvature.structured import Block, StructuredBlock


def transported(source: Decomposition, blocks: Sequence[Block], target: Decomposition) -> list[Block]:
    """For every bucket of the target the blocks of its kinds.

    Raises ValueError for a kind that the source does not have, or has with other copies.
    """
    places = {key: (b, k) for b, bucket in enumerate(source.buckets) for k, key in enumerate(bucket.kinds)}
    result: list[Block] = []
    for bucket in target.buckets:
        found = []
        for k, key in enumerate(bucket.kinds):
            if key not in places:
                raise ValueError(f"transport: the operator has no block of kind {_name(key)}, which this size has")
            b, i = places[key]
            found.append(_block(source.buckets[b], i, blocks[b], bucket, k))
        first = found[0]
        if isinstance(first, StructuredBlock):
            result.append(first)
        else:
            result.append(DenseBlock(torch.cat([block.to_dense().matrix for block in found])))
    return result


def _block(source: Bucket, i: int, block: Block, target: Bucket, k: int) -> Block:
    """The block of one kind, with its copies in the order of the target."""
    order = _order(source, i, target, k)
    if isinstance(block, StructuredBlock):
        values = block.values if block.constant else block.values[order]
        return StructuredBlock(target.copies, values, block.left[order], block.right[order])
    return DenseBlock(block.matrix[i : i + 1][..., order, :][..., order])


def _order(source: Bucket, i: int, target: Bucket, k: int) -> list[int]:
    """Where each copy of the target is among those of the source."""
    starts: dict[tuple[str, int, int, int], int] = {}
    position = 0
    for key in _numbered(source.rows[i]):
        starts[key] = position
        position += key[2]
    order: list[int] = []
    for key in _numbered(target.rows[k]):
        if key not in starts:
            order = []
            break
        order += range(starts[key], starts[key] + key[2])
    if len(order) != source.copies or source.batch != target.batch:
        raise ValueError(
            f"transport: kind {_name(target.kinds[k])} has {source.batch} x {source.copies} copies in the operator and"
            f" {target.batch} x {target.copies} at this size; sizes on which no group acts must stay the same"
        )
    return order


def _numbered(rows: tuple[tuple[str, int, int], ...]) -> list[tuple[str, int, int, int]]:
    """Rows, with a number for those that a block has several of."""
    seen: dict[tuple[str, int, int], int] = {}
    result = []
    for row in rows:
        seen[row] = seen.get(row, 0) + 1
        result.append((*row, seen[row]))
    return result


def _name(key: KindKey) -> str:
    return " x ".join(f"{name}:{label}" for name, label in key) or "trivial"
