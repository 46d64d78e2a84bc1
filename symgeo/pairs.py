"""Every GL, rotary and LoRA instance of a model as factor pairs, batched by shape.

All blocks that carry a group ``e`` are the rows of ``G``, all that carry ``e*`` the rows of ``H``; the copies of
``per`` are a batch.  A rotary plane is a complex pair with ``h = 1``.  What no pair owns is one flat vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from symgeo.errors import SymmetryError
from symgeo.functional import Params
from symgeo.groups import GeneralLinear, Group, Rotary
from symgeo.symmetry import Action
from symgeo.symmetry.layout import Dim, Layout, assemble, block_dims, split

BlockKey = tuple[str, int]  # parameter, position of the block in it


@dataclass(frozen=True)
class Member:
    """One block of one side of a pair: where it lies and how its dimensions become (copies, rows, h)."""

    key: BlockKey
    shape: tuple[int, ...]
    order: tuple[int, ...]
    copies: int
    rows: int

    def stack(self, block: Tensor) -> Tensor:
        """The block as ``(copies, rows, h)``."""
        return block.permute(self.order).reshape(self.copies, self.rows, -1)

    def unstack(self, stacked: Tensor) -> Tensor:
        """The inverse of :meth:`stack`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return stacked.reshape([self.shape[i] for i in self.order]).permute(inverse)


@dataclass(frozen=True)
class Instance:
    """All copies of one group: the blocks that carry it and the blocks that carry its dual."""

    name: str
    group: Group
    primal: tuple[Member, ...]
    dual: tuple[Member, ...]
    size: int

    @property
    def signature(self) -> tuple[int, int, int, bool, str]:
        """Rows of G, rows of H, h, complex, pairing: instances that agree share a batch."""
        rotary = isinstance(self.group, Rotary)
        pairing = self.group.pairing if isinstance(self.group, Rotary) else ""
        return _rows(self.primal), _rows(self.dual), 1 if rotary else self.size, rotary, pairing

    @property
    def batch(self) -> int:
        """Number of pairs: copies, times planes for a rotary group."""
        return self.primal[0].copies * (self.size // 2 if isinstance(self.group, Rotary) else 1)

    def gather(self, blocks: Mapping[BlockKey, Tensor]) -> Tensor:
        """The stacked pairs ``(batch, n + m, h)``."""
        rows = torch.cat([member.stack(blocks[member.key]) for member in (*self.primal, *self.dual)], dim=1)
        return _planes(rows, self.group) if isinstance(self.group, Rotary) else rows

    def scatter(self, pairs: Tensor) -> dict[BlockKey, Tensor]:
        """The blocks of stacked pairs."""
        if isinstance(self.group, Rotary):
            pairs = _from_planes(pairs, self.group, self.size)
        members = (*self.primal, *self.dual)
        pieces = pairs.split([member.rows for member in members], dim=1)
        return {member.key: member.unstack(piece) for member, piece in zip(members, pieces)}


def _rows(members: Sequence[Member]) -> int:
    return sum(member.rows for member in members)


def _planes(rows: Tensor, group: Rotary) -> Tensor:
    """Real rows ``(copies, rows, d)`` as complex ``(copies d/2, rows, 1)``."""
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

    Raises ``SymmetryError`` naming group and parameter where a declaration is no factor pair: a group with
    only one side, two such groups on one block, or one group on two axes of a block.
    """

    def __init__(self, params: Params, action: Action | None):
        self.shapes = {name: tuple(p.shape) for name, p in params.items()}
        self.layouts: dict[str, Layout] = dict(action.layouts) if action else {}
        instances = _instances(action) if action else []
        signatures = list(dict.fromkeys(instance.signature for instance in instances))
        self.buckets = {f"pairs {s[0]}+{s[1]}x{s[2]}{' complex' * s[3]}{s[4]}": [i for i in instances if i.signature == s]
                        for s in signatures}
        self.rows = {name: bucket[0].signature[0] for name, bucket in self.buckets.items()}
        owned = {m.key for i in instances for m in (*i.primal, *i.dual)}
        self.split_names = sorted({key[0] for key in owned})
        self.rest = [key for name in params for key in self._keys(name) if key not in owned]
        self.rest_shapes = [self._block_shape(key) for key in self.rest]

    @property
    def pairs(self) -> int:
        """Number of factor pairs."""
        return sum(instance.batch for bucket in self.buckets.values() for instance in bucket)

    def _keys(self, name: str) -> list[BlockKey]:
        if name not in self.split_names:
            return [(name, 0)]
        return [(name, i) for i in range(len(block_dims(self.layouts[name])))]

    def _block_shape(self, key: BlockKey) -> tuple[int, ...]:
        if key[0] not in self.split_names:
            return self.shapes[key[0]]
        return tuple(dim.size for dim in block_dims(self.layouts[key[0]])[key[1]])

    def pack(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"rest": flat vector, bucket: stacked pairs}``."""
        blocks = {}
        for name in self.shapes:
            pieces = split(self.layouts[name], params[name]) if name in self.split_names else [params[name]]
            blocks.update({(name, i): piece for i, piece in enumerate(pieces)})
        rest = [blocks[key].reshape(-1) for key in self.rest]
        packed = {"rest": torch.cat(rest) if rest else next(iter(params.values())).new_zeros(0)}
        for name, bucket in self.buckets.items():
            packed[name] = torch.cat([instance.gather(blocks) for instance in bucket])
        return packed

    def unpack(self, packed: Mapping[str, Tensor]) -> Params:
        """The inverse of :meth:`pack`; parameters that no pair touches are views of the flat vector."""
        sizes = [prod(shape) for shape in self.rest_shapes]
        pieces = zip(self.rest, packed["rest"].split(sizes), self.rest_shapes)
        blocks = {key: piece.view(shape) for key, piece, shape in pieces}
        for name, bucket in self.buckets.items():
            for instance, pairs in zip(bucket, packed[name].split([i.batch for i in bucket])):
                blocks.update(instance.scatter(pairs))
        return {name: self._assembled(name, blocks) for name in self.shapes}

    def _assembled(self, name: str, blocks: Mapping[BlockKey, Tensor]) -> Tensor:
        if name not in self.split_names:
            return blocks[name, 0]
        return assemble(self.layouts[name], [blocks[key] for key in self._keys(name)]).reshape(self.shapes[name])

    def map(self, packed: Mapping[str, Tensor], f: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """``f(name, tensor)`` on every batch and on the flat vector."""
        return {name: f(name, tensor) for name, tensor in packed.items()}


def _instances(action: Action) -> list[Instance]:
    """The pair groups of a bound symmetry, in order."""
    result, owner = [], dict[BlockKey, str]()
    for name, group in action.groups.items():
        if not isinstance(group, GeneralLinear | Rotary):
            continue
        sides: dict[bool, list[Member]] = {False: [], True: []}
        for parameter, layout in action.layouts.items():
            for i, dims in enumerate(block_dims(layout)):
                places = [k for k, dim in enumerate(dims) if dim.name == name]
                if not places:
                    continue
                _claim(owner, (parameter, i), name, len(places))
                member = _member((parameter, i), dims, places[0], group.per)
                sides[dims[places[0]].dual].append(member)
        if not sides[False] and not sides[True]:
            continue
        if not (sides[False] and sides[True]):
            found = next(m.key[0] for m in (*sides[False], *sides[True]))
            raise SymmetryError(
                f"group {name!r} acts on {found!r} but nothing carries {'its dual ' if sides[False] else 'the plain '}"
                f"{name + '*' if sides[False] else name!r}: a factor pair needs both sides"
            )
        result.append(Instance(name, group, tuple(sides[False]), tuple(sides[True]), action.sizes[name]))
    return result


def _claim(owner: dict[BlockKey, str], key: BlockKey, name: str, times: int) -> None:
    """Records that a group owns a block, or says why this is not a factor pair."""
    if times > 1:
        raise SymmetryError(f"group {name!r} acts on {times} axes of {key[0]!r}: not a factor pair")
    if key in owner:
        raise SymmetryError(
            f"parameter {key[0]!r} carries both {owner[key]!r} and {name!r}: chained pairs have no metric here; "
            "declare one of the two groups only"
        )
    owner[key] = name


def _member(key: BlockKey, dims: Sequence[Dim], place: int, per: str | None) -> Member:
    copies = [k for k, dim in enumerate(dims) if per is not None and dim.name == per]
    rows = [k for k in range(len(dims)) if k != place and k not in copies]
    shape = tuple(dim.size for dim in dims)
    return Member(key, shape, (*copies, *rows, place), prod(shape[k] for k in copies), prod(shape[k] for k in rows))
