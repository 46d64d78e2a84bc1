"""Whether processes have the same parameters: asked once, because a mistake would mix models silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from symgeo.distributed.processes import Processes
from symgeo.distributed.shards import is_sharded


def check_same(team: Processes, params: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless all processes have parameters of the same names, shapes and dtypes, in one order."""
    mine = [(name, tuple(p.shape), str(p.dtype), is_sharded(p)) for name, p in params.items()]
    for rank, theirs in enumerate(team.gather(mine)):
        if theirs != mine:
            here, there = next((a, b) for a, b in zip([*mine, None], [*theirs, None]) if a != b)
            raise ValueError(
                f"process {team.ranks[rank]} has other parameters than process {team.ranks[team.rank]}: {there} against"
                f" {here}; processes that train models of their own need process_group=False"
            )


def check_agreed(team: Processes, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first of these arguments that is not the same on all processes."""
    said = team.gather(dict(arguments))
    for name, first in said[0].items():
        for rank, theirs in zip(team.ranks, said):
            if theirs[name] != first:
                raise ValueError(
                    f"{name}: needed the same on all processes; found {first} on process {team.ranks[0]} and "
                    f"{theirs[name]} on process {rank}"
                )


def check_replicas(team: Processes, params: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless all processes have the same values of every parameter that is not sharded."""
    replicas = {name: p for name, p in params.items() if not is_sharded(p) and p.numel()}
    if not replicas:
        return
    sums = torch.stack([_checksum(p) for p in replicas.values()]).tolist()
    said = team.gather(sums)
    for rank, theirs in enumerate(said):
        for name, a, b in zip(replicas, theirs, said[0]):
            if a != b:
                raise ValueError(
                    f"parameter {name!r} differs between the processes {team.ranks[0]} and {team.ranks[rank]}; wrap the"
                    " model in DistributedDataParallel before the first step, or, for models of their own, pass"
                    " process_group=False"
                )


def _checksum(p: Tensor) -> Tensor:
    """The sum of the bits of the entries as whole numbers: the same for the same values on every machine."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    return p.detach().contiguous().view(kinds[p.element_size()]).sum(dtype=torch.int64)
