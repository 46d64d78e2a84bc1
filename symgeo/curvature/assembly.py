"""Where the copies of every kind are among the outputs of the plans, and kinds of equal structure as buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symgeo.curvature.leaves import Collection, KindKey, Leaves
from symgeo.errors import SymmetryError
from symgeo.kernels import gram

#: (collection, output of its plan, block in the collection)
Place = tuple[int, int, int]
Choice = slice | Tensor | None


@dataclass(frozen=True)
class Bucket:
    """Kinds of equal structure: their coordinates are one tensor X of shape (K, B, M, D).

    Attributes
    ----------
    kinds: the keys of the K kinds, each with B members (a sign or a frequency each, say)
    batch, copies, coordinates: B, M and D. Copies are rows; coordinates may be redundant (a centred vector of
        length n stands for n - 1 dimensions)
    dimension: d, the dimension of the irreducible representation over the reals
    complex: whether X is complex
    rows: for every kind, where its copies come from: (parameter, block, copies)
    """

    kinds: tuple[KindKey, ...]
    batch: int
    copies: int
    coordinates: int
    dimension: int
    complex: bool
    rows: tuple[tuple[tuple[str, int, int], ...], ...]

    @property
    def trivial(self) -> bool:
        """Whether the group acts trivially here: K = B = D = d = 1."""
        return self.kinds == ((),)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(K, B, M, D)"""
        return len(self.kinds), self.batch, self.copies, self.coordinates

    def gram(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """T = X Y^H / d, (K, B, M, M): the block of the orbit average of u v^T."""
        own = y is None and not x.is_complex()
        return (gram(x) if own else x @ (x if y is None else y).mH) / self.dimension


@dataclass(frozen=True)
class _Source:
    """Rows of a bucket: one output of a plan, for some of its blocks; `choice` says how to take them."""

    collection: int
    final: int
    blocks: tuple[int, ...]
    choice: Choice


class Assembly:
    """The buckets of a collection of leaves, and the way between plan outputs and buckets.

    Raises SymmetryError where copies of one kind are numbered in two ways.
    """

    def __init__(self, leaves: Leaves, device: torch.device) -> None:
        self._collections, self._device = leaves.collections, device
        kinds = self._kinds(leaves)
        structures: dict[tuple[tuple[int, int], ...], list[KindKey]] = {}
        for key, places in kinds.items():
            if key:
                structures.setdefault(tuple((c, f) for c, f, _ in places), []).append(key)
        self._sources: list[list[_Source]] = []
        self.buckets: tuple[Bucket, ...] = ()
        if () in kinds:
            self._add_trivial(kinds[()])
        for structure, keys in structures.items():
            self._add(structure, keys, kinds)
        self._returns = self._find_returns()

    def select(self, pieces: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The outputs of all plans as one tensor (K, B, M, D) for every bucket."""
        result = []
        for bucket, sources in zip(self.buckets, self._sources):
            rows = [_chosen(pieces[s.collection][s.final], s.choice) for s in sources]
            if bucket.trivial:
                rows = [row.reshape(1, 1, -1, 1) for row in rows]
            result.append(torch.cat(rows, dim=2) if len(rows) > 1 else rows[0])
        return result

    def scatter(self, rows: Sequence[Tensor]) -> list[list[Tensor]]:
        """The inverse of `select`; rows may have any dimensions after (K, B, M)."""
        result: list[list[Tensor]] = []
        for collection, returns in zip(self._collections, self._returns):
            pieces = []
            for final, (parts, order) in zip(collection.plan.finals, returns):
                found = [rows[b].narrow(2, start, length) for b, start, length in parts]
                if not final.labels:
                    blocks = len(collection.leaves)
                    found = [x.reshape(blocks, 1, final.shape[1], *x.shape[3:]) for x in found]
                joined = torch.cat(found) if len(found) > 1 else found[0]
                pieces.append(joined if order is None else joined.index_select(0, order))
            result.append(pieces)
        return result

    def totals(self, energies: Sequence[Tensor]) -> list[Tensor]:
        """From a number for every block, (K,) in every collection: for a trivial bucket that of every copy,
        (1, 1, M, 1), for others the sum over all blocks that have copies there, (K, 1, 1, 1)."""
        result = []
        for bucket, sources in zip(self.buckets, self._sources):
            if bucket.trivial:
                copies = [self._final_copies(s.collection, s.final) for s in sources]
                rows = [energies[s.collection].repeat_interleave(m) for s, m in zip(sources, copies)]
                result.append(torch.cat(rows).reshape(1, 1, -1, 1))
            else:
                rows = [_chosen(energies[s.collection], s.choice) for s in sources]
                result.append(torch.stack(rows).sum(0)[:, None, None, None])
        return result

    def _kinds(self, leaves: Leaves) -> dict[KindKey, list[Place]]:
        """For every kind the places that hold its copies, in the order of blocks."""
        kinds: dict[KindKey, list[Place]] = {}
        numberings: dict[KindKey, tuple[object, str]] = {}
        for c, k in leaves.places():
            leaf = self._collections[c].leaves[k]
            for f, final in enumerate(self._collections[c].plan.finals):
                key, numbering = leaf.key(final), leaf.owners(final)
                known, first = numberings.setdefault(key, (numbering, leaf.parameter))
                if known != numbering:
                    raise SymmetryError(
                        f"parameters {first!r} and {leaf.parameter!r}: copies of {', '.join(n for n, _ in key)} are"
                        " numbered by one dimension in one of them and by several in the other, which is not covered;"
                        " leave one of the groups out"
                    )
                kinds.setdefault(key, []).append((c, f, k))
        return kinds

    def _add_trivial(self, places: list[Place]) -> None:
        """All trivial copies, collection by collection."""
        blocks: dict[tuple[int, int], list[int]] = {}
        for c, f, k in places:
            blocks.setdefault((c, f), []).append(k)
        rows = tuple(self._row(c, f, k) for (c, f), ks in blocks.items() for k in ks)
        self._sources.append([self._source(c, f, tuple(ks)) for (c, f), ks in blocks.items()])
        self.buckets += (Bucket(((),), 1, sum(m for *_, m in rows), 1, 1, False, (rows,)),)

    def _add(
        self, structure: tuple[tuple[int, int], ...], keys: list[KindKey], kinds: Mapping[KindKey, list[Place]]
    ) -> None:
        """Kinds that take the same outputs of the same plans, for different blocks."""
        first = self._collections[structure[0][0]].plan.finals[structure[0][1]]
        batch, _, coordinates = first.shape
        copies = sum(self._final_copies(c, f) for c, f in structure)
        rows = tuple(tuple(self._row(*place) for place in kinds[key]) for key in keys)
        self._sources.append([
            self._source(c, f, tuple(kinds[key][i][2] for key in keys)) for i, (c, f) in enumerate(structure)
        ])
        dimension, is_complex = first.piece.dimension, first.piece.complex
        self.buckets += (Bucket(tuple(keys), batch, copies, coordinates, dimension, is_complex, rows),)

    def _final_copies(self, c: int, f: int) -> int:
        return self._collections[c].plan.finals[f].shape[1]

    def _row(self, c: int, f: int, k: int) -> tuple[str, int, int]:
        leaf = self._collections[c].leaves[k]
        return leaf.parameter, leaf.index, self._final_copies(c, f)

    def _source(self, c: int, f: int, blocks: tuple[int, ...]) -> _Source:
        return _Source(c, f, blocks, _choice(blocks, self._collections[c], self._device))

    def _find_returns(self) -> list[list[tuple[list[Place], Tensor | None]]]:
        """For every output of every plan: the (bucket, first row, rows) that hold it, and how to order the blocks."""
        pieces: dict[tuple[int, int], tuple[list[Place], list[int]]] = {}
        for b, (bucket, sources) in enumerate(zip(self.buckets, self._sources)):
            start = 0
            for s in sources:
                length = self._final_copies(s.collection, s.final) * (len(s.blocks) if bucket.trivial else 1)
                parts, blocks = pieces.setdefault((s.collection, s.final), ([], []))
                parts.append((b, start, length))
                blocks.extend(s.blocks)
                start += length
        return [
            [(pieces[c, f][0], _sorting(pieces[c, f][1], self._device)) for f in range(len(collection.plan.finals))]
            for c, collection in enumerate(self._collections)
        ]


def _choice(blocks: tuple[int, ...], collection: Collection, device: torch.device) -> Choice:
    """How to take blocks of a collection: all in order (None), a regular slice, or an index."""
    if blocks == tuple(range(len(collection.leaves))):
        return None
    step = blocks[1] - blocks[0] if len(blocks) > 1 else 1
    if step > 0 and blocks == tuple(range(blocks[0], blocks[0] + step * len(blocks), step)):
        return slice(blocks[0], blocks[-1] + 1, step)
    return torch.tensor(blocks, device=device)


def _chosen(x: Tensor, choice: Choice) -> Tensor:
    if choice is None:
        return x
    return x[choice] if isinstance(choice, slice) else x.index_select(0, choice)


def _sorting(blocks: list[int], device: torch.device) -> Tensor | None:
    """The index that sorts, or None if nothing is to be done."""
    order = sorted(range(len(blocks)), key=blocks.__getitem__)
    return None if order == list(range(len(blocks))) else torch.tensor(order, device=device)
