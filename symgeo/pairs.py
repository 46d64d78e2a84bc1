"""Every GL, rotary and LoRA instance of a model as factor pairs, batched by shape.

All blocks that carry a group ``e`` are the rows of ``G``, all that carry ``e*`` the rows of ``H``; the copies of
``per`` are a batch.  A rotary plane is a complex pair with ``h = 1``.  What no pair owns is one flat vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from symgeo.errors import SymmetryError
from symgeo.functional import Params
from symgeo.groups import GeneralLinear, Group, Rotary
from symgeo.symmetry import Action, Block, assemble, split
from symgeo.symmetry.layout import Layout, block_dims

BlockKey = tuple[str, int]  # parameter, position of the block in it


@dataclass(frozen=True)
class Instance:
    """All copies of one group: the blocks that carry it and the blocks that carry its dual."""

    group: Group
    primal: tuple[Block, ...]
    dual: tuple[Block, ...]
    size: int
    copies: int

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks in the order of their rows."""
        return (*self.primal, *self.dual)

    @property
    def signature(self) -> tuple[int, int, int, str]:
        """Rows of G, rows of H, h, pairing of a rotary group: instances that agree share a batch."""
        n, m = (sum(self._rows(block) for block in side) for side in (self.primal, self.dual))
        return (n, m, 1, self.group.pairing) if isinstance(self.group, Rotary) else (n, m, self.size, "")

    @property
    def batch(self) -> int:
        """Number of pairs: copies, times planes for a rotary group."""
        return self.copies * (self.size // 2 if isinstance(self.group, Rotary) else 1)

    def gather(self, blocks: Mapping[BlockKey, Tensor]) -> Tensor:
        """The stacked pairs ``(batch, n + m, h)``."""
        stacked = [block.rows(blocks[key(block)]).reshape(self.copies, -1, self.size) for block in self.blocks]
        rows = torch.cat(stacked, dim=1)
        return _planes(rows, self.group) if isinstance(self.group, Rotary) else rows

    def scatter(self, pairs: Tensor) -> dict[BlockKey, Tensor]:
        """The blocks of stacked pairs."""
        if isinstance(self.group, Rotary):
            pairs = _from_planes(pairs, self.group, self.size)
        pieces = pairs.split([self._rows(block) for block in self.blocks], dim=1)
        return {key(block): block.restore(piece) for block, piece in zip(self.blocks, pieces)}

    def _rows(self, block: Block) -> int:
        return prod(block.shape) // (self.copies * self.size)


def key(block: Block) -> BlockKey:
    """Where a block lies."""
    return block.parameter, block.index


def _planes(rows: Tensor, group: Rotary) -> Tensor:
    """Real rows ``(copies, rows, d)`` as complex ``(copies d/2, rows, 1)``, at least in single precision."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    half = rows.shape[-1] // 2
    if group.pairing == "half":
        parts = rows.unflatten(-1, (2, half)).transpose(-1, -2)
    else:
        parts = rows.unflatten(-1, (half, 2))
    return torch.view_as_complex(parts.contiguous()).transpose(-1, -2).reshape(-1, rows.shape[-2], 1)


def _from_planes(pairs: Tensor, group: Rotary, size: int) -> Tensor:
    rows = torch.view_as_real(pairs.reshape(-1, size // 2, pairs.shape[-2]).transpose(-1, -2))
    if group.pairing == "half":
        rows = rows.transpose(-1, -2)
    return rows.flatten(-2)


class PairLayout:
    """How a dict of parameters becomes batches of factor pairs and one flat vector, and back.

    Frozen parameters are in neither: they are constants.

    Raises ``SymmetryError`` naming group and parameter where a declaration is no factor pair: a group with
    only one side, two such groups on one block, or one group on two axes of a block.
    """

    def __init__(self, params: Params, action: Action | None):
        self.shapes = {name: tuple(p.shape) for name, p in params.items() if not (action and name in action.frozen)}
        self.layouts: dict[str, Layout] = dict(action.layouts) if action else {}
        instances = _instances(action) if action else []
        signatures = list(dict.fromkeys(instance.signature for instance in instances))
        self.buckets = {
            f"pairs {n}+{m}x{h}{pairing and ' rotary '}{pairing}": [
                instance for instance in instances if instance.signature == (n, m, h, pairing)
            ]
            for n, m, h, pairing in signatures
        }
        self.rows = {name: bucket[0].signature[0] for name, bucket in self.buckets.items()}
        owned = {key(block) for instance in instances for block in instance.blocks}
        self.split_names = {name for name, _ in owned}
        self.rest = [place for name in self.shapes for place in self._keys(name) if place not in owned]
        self.rest_shapes = [self._block_shape(place) for place in self.rest]

    @property
    def pairs(self) -> int:
        """Number of factor pairs."""
        return sum(instance.batch for bucket in self.buckets.values() for instance in bucket)

    def _keys(self, name: str) -> list[BlockKey]:
        if name not in self.split_names:
            return [(name, 0)]
        return [(name, i) for i in range(len(block_dims(self.layouts[name])))]

    def _block_shape(self, place: BlockKey) -> tuple[int, ...]:
        name, index = place
        if name not in self.split_names:
            return self.shapes[name]
        return tuple(dim.size for dim in block_dims(self.layouts[name])[index])

    def pack(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"rest": flat vector, bucket: stacked pairs}``."""
        blocks = {}
        for name in self.shapes:
            pieces = split(self.layouts[name], params[name]) if name in self.split_names else [params[name]]
            blocks.update({(name, i): piece for i, piece in enumerate(pieces)})
        rest = [blocks[place].reshape(-1) for place in self.rest]
        packed = {"rest": torch.cat(rest) if rest else next(iter(params.values())).new_zeros(0)}
        for name, bucket in self.buckets.items():
            packed[name] = torch.cat([instance.gather(blocks) for instance in bucket])
        return packed

    def unpack(self, packed: Mapping[str, Tensor]) -> Params:
        """The inverse of :meth:`pack`; parameters that no pair touches are views of the flat vector."""
        sizes = [prod(shape) for shape in self.rest_shapes]
        pieces = zip(self.rest, packed["rest"].split(sizes), self.rest_shapes)
        blocks = {place: piece.view(shape) for place, piece, shape in pieces}
        for name, bucket in self.buckets.items():
            for instance, pairs in zip(bucket, packed[name].split([i.batch for i in bucket])):
                blocks.update(instance.scatter(pairs))
        return {name: self._assembled(name, blocks) for name in self.shapes}

    def _assembled(self, name: str, blocks: Mapping[BlockKey, Tensor]) -> Tensor:
        if name not in self.split_names:
            return blocks[name, 0]
        return assemble(self.layouts[name], [blocks[place] for place in self._keys(name)]).reshape(self.shapes[name])


def _instances(action: Action) -> list[Instance]:
    """The pair groups of a bound symmetry, in order."""
    result, owner = [], dict[BlockKey, str]()
    for name, group in action.groups.items():
        blocks = action.blocks(name)
        if not isinstance(group, GeneralLinear | Rotary) or not blocks:
            continue
        for block in blocks:
            _claim(owner, block, name)
        primal, dual = (tuple(b for b in blocks if b.dual is side) for side in (False, True))
        if not (primal and dual):
            raise SymmetryError(
                f"group {name!r} acts on {blocks[0].parameter!r}, but nothing carries "
                f"{name + '*' if primal else name!r}: a factor pair needs both sides"
            )
        result.append(Instance(group, primal, dual, action.sizes[name], prod(action.copies[name])))
    return result


def _claim(owner: dict[BlockKey, str], block: Block, name: str) -> None:
    """Records that a group owns a block, or says why this is not a factor pair."""
    place = key(block)
    if owner.get(place) == name:
        raise SymmetryError(f"group {name!r} acts on two axes of {block.parameter!r}: not a factor pair")
    if place in owner:
        raise SymmetryError(
            f"parameter {block.parameter!r} carries both {owner[place]!r} and {name!r}: chained pairs have no metric "
            "here; declare one of the two groups only"
        )
    owner[place] = name
