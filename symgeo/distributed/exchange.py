"""Flat collectives: whole tensors to the process that owns them, and what it made of them back to all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from symgeo.distributed.processes import Processes, all_gather
from symgeo.distributed.shards import Box, boxes, is_sharded, local

#: bytes that a process receives in one message of replicas
MESSAGE_BYTES = 2**27

#: part of a tensor that one process sends to another: name, box in the whole tensor
Piece = tuple[str, Box]


class Exchange:
    """Between parameters as processes hold them (replicas, or parts) and whole tensors at their owners.

    One message to every other process in each direction, whatever the number of parameters; replicas cost an
    all-gather of what was made of them, in messages of `MESSAGE_BYTES`, and nothing on the way in.

    Parameters
    ----------
    params: in one order on all processes; owner: the number of the process that gets each
    known: the boxes of these parameters, where they have been found already
    """

    def __init__(
        self, team: Processes, params: Mapping[str, Tensor], owner: Mapping[str, int],
        known: Mapping[str, list[Box]] | None = None,
    ) -> None:
        self.team, self.owner = team, dict(owner)
        self.sharded = {name: is_sharded(p) for name, p in params.items()}
        self.boxes = boxes(params, team) if known is None else {name: known[name] for name in params}
        self.shapes = {name: tuple(p.shape) for name, p in params.items()}
        self.devices = {name: local(p).device for name, p in params.items()}
        self.owned = [name for name in params if owner[name] == team.rank]

    def collect(
        self, tensors: Mapping[str, Tensor | None], dtype: Callable[[str], torch.dtype],
        have: Mapping[str, Sequence[bool]] | None = None,
    ) -> dict[str, Tensor]:
        """The whole tensors of what this process owns, from what all have of them.

        have: for every name which processes have a tensor, where some may have none.  Of a sharded one the missing
        parts are zeros, and a replica comes from the owner, or from the first that has it; a name that no process has
        is left out.  dtype: of the tensors of a name, where this process has none itself.
        """
        names = [name for name in self.shapes if have is None or any(have[name])]
        routes = {name: self._senders(name, None if have is None else have[name]) for name in names}
        kept = {name: tensors[name] for name in names if self._stays(name, routes[name])}
        moving = [name for name in names if any(s != self.owner[name] for s in routes[name])]
        found: dict[str, Tensor] = {}
        for kind, group in _by_dtype(moving, dtype).items():
            found |= self._collect(group, kind, tensors, routes)
        result = {}
        for name in self.owned:
            if name in found:
                result[name] = found[name]
            elif name in kept:
                mine = kept[name]
                if mine is None:
                    mine = torch.zeros(self.shapes[name], dtype=dtype(name), device=self.devices[name])
                result[name] = local(mine)
        return result

    def spread(self, whole: Mapping[str, Tensor], names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """For all of these names what this process holds of the tensors that their owners give, in this dtype."""
        wanted = list(names)
        parts = [name for name in wanted if self.sharded[name]]
        replicas = [name for name in wanted if not self.sharded[name]]
        return {**self._spread_replicas(replicas, whole, dtype), **self._spread_parts(parts, whole, dtype)}

    def _senders(self, name: str, have: Sequence[bool] | None) -> dict[int, Box]:
        """Who sends what to the owner, so that every entry arrives once."""
        owner = self.owner[name]
        if not self.sharded[name]:
            sender = owner if have is None or have[owner] else list(have).index(True)
            return {sender: self.boxes[name][sender]}
        found: dict[Box, int] = {}
        for rank in (owner, *range(self.team.size)):  # of equal parts the owner's own, if it has it
            box = self.boxes[name][rank]
            if box.size:
                found.setdefault(box, rank)
        return {rank: box for box, rank in found.items()}

    def _stays(self, name: str, senders: Mapping[int, Box]) -> bool:
        """Whether the owner, this process, needs nobody else."""
        return self.owner[name] == self.team.rank and set(senders) <= {self.team.rank}

    def _collect(
        self, names: Sequence[str], dtype: torch.dtype, tensors: Mapping[str, Tensor | None],
        routes: Mapping[str, Mapping[int, Box]],
    ) -> dict[str, Tensor]:
        me, size, device = self.team.rank, self.team.size, self.devices[names[0]]
        sent: list[list[Tensor]] = [[] for _ in range(size)]
        arriving: list[list[Piece]] = [[] for _ in range(size)]
        for name in names:
            owner, senders = self.owner[name], routes[name]
            if me in senders:
                mine = tensors[name]
                piece = torch.zeros(senders[me].size, dtype=dtype, device=device) if mine is None else local(mine)
                sent[owner].append(piece.reshape(-1).to(dtype))
            if owner == me:
                for rank, box in senders.items():
                    arriving[rank].append((name, box))
        received = _all_to_all(sent, [sum(b.size for _, b in row) for row in arriving], dtype, device, self.team.group)
        mine_now = [name for name in names if self.owner[name] == me]
        result = {name: torch.empty(self.shapes[name], dtype=dtype, device=device) for name in mine_now}
        for flat, row in zip(received, arriving):
            for piece, (name, box) in zip(flat.split([box.size for _, box in row]), row):
                box.of(result[name]).copy_(piece.reshape(box.shape))
        return result

    def _spread_parts(self, names: Sequence[str], whole: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        if not names:
            return {}
        me, size, device = self.team.rank, self.team.size, self.devices[names[0]]
        sent: list[list[Tensor]] = [[] for _ in range(size)]
        arriving: list[list[Piece]] = [[] for _ in range(size)]
        for name in names:
            owner = self.owner[name]
            arriving[owner].append((name, self.boxes[name][me]))
            if owner == me:
                for rank, box in enumerate(self.boxes[name]):
                    sent[rank].append(box.of(whole[name]).reshape(-1).to(dtype))
        received = _all_to_all(sent, [sum(b.size for _, b in row) for row in arriving], dtype, device, self.team.group)
        result: dict[str, Tensor] = {}
        for flat, row in zip(received, arriving):
            for piece, (name, box) in zip(flat.split([box.size for _, box in row]), row):
                result[name] = piece.reshape(box.shape)
        return result

    def _spread_replicas(
        self, names: Sequence[str], whole: Mapping[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        if not names:
            return {}
        rows: list[list[str]] = [[] for _ in range(self.team.size)]
        for name in names:
            rows[self.owner[name]].append(name)
        me, size, device = self.team.rank, self.team.size, self.devices[names[0]]
        sizes = {name: self.boxes[name][0].size for name in names}
        length = max(sum(sizes[name] for name in row) for row in rows)
        mine = {name: whole[name].reshape(-1) for name in rows[me]}
        flats = {name: torch.empty(sizes[name], dtype=dtype, device=device) for name in names}
        step = max(1, MESSAGE_BYTES // (size * dtype.itemsize))
        for start in range(0, length, step):
            stop = min(start + step, length)
            sent = torch.zeros(stop - start, dtype=dtype, device=device)
            for name, there, here in _within(rows[me], sizes, start, stop):
                sent[there] = mine[name][here].to(dtype)
            gathered = torch.empty(size * len(sent), dtype=dtype, device=device)
            all_gather(gathered, sent, self.team.group)
            for part, row in zip(gathered.split(len(sent)), rows):
                for name, there, here in _within(row, sizes, start, stop):
                    flats[name][here] = part[there]
        return {name: flat.reshape(self.shapes[name]) for name, flat in flats.items()}


def _within(
    names: Iterable[str], sizes: Mapping[str, int], start: int, stop: int
) -> Iterator[tuple[str, slice, slice]]:
    """What a window of tensors one behind the other has of each: where in the window, and where in the tensor.

    >>> list(_within("ab", {"a": 3, "b": 5}, 2, 4))
    [('a', slice(0, 1, None), slice(2, 3, None)), ('b', slice(1, 2, None), slice(0, 1, None))]
    """
    begin = 0
    for name in names:
        first, last = max(begin, start), min(begin + sizes[name], stop)
        if first < last:
            yield name, slice(first - start, last - start), slice(first - begin, last - begin)
        begin += sizes[name]


def _by_dtype(names: Iterable[str], dtype: Callable[[str], torch.dtype]) -> dict[torch.dtype, list[str]]:
    found: dict[torch.dtype, list[str]] = {}
    for name in names:
        found.setdefault(dtype(name), []).append(name)
    return found


def _all_to_all(
    sent: Sequence[Sequence[Tensor]], lengths: Sequence[int], dtype: torch.dtype, device: torch.device, group: Any
) -> tuple[Tensor, ...]:
    """One flat message to every process; what came from each, of these lengths."""
    flat = [torch.cat(list(row)) if row else torch.empty(0, dtype=dtype, device=device) for row in sent]
    received = torch.empty(sum(lengths), dtype=dtype, device=device)
    dist.all_to_all_single(received, torch.cat(flat), list(lengths), [len(x) for x in flat], group=group)
    return received.split(list(lengths))
