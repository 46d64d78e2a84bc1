"""State of an optimizer between processes that each have a part of it, and files that have all."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from symgeo.distributed import is_sharded
from symgeo.optim.plan import Plan
from symgeo.optim.sharing import Shared

Entry = dict[str, Any]


def keep_owned(plan: Plan, state: MutableMapping[Tensor, Entry]) -> None:
    """Drop what other processes own, and cut whole tensors where a parameter is sharded, after a state was loaded."""
    if not isinstance(plan.share, Shared):
        return
    for name, p in plan.params.items():
        entry = state.get(p, {})
        if name in plan.members and name not in plan.share.owned:
            for key in [key for key in entry if key != "step"]:
                del entry[key]
        elif name not in plan.members and is_sharded(p):
            for key, value in entry.items():
                if isinstance(value, Tensor) and value.shape == p.shape and not is_sharded(value):
                    entry[key] = _like(p, value)


def consolidated(plan: Plan, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """The state of all processes as one process would have it, on the CPU, at process 0; None at the others."""
    if not isinstance(plan.share, Shared):
        return state_dict
    mine = {number: {key: _whole(value) for key, value in entry.items()}
            for number, entry in state_dict["state"].items()}
    team = plan.share.team
    found: list[Mapping[int, Entry]] | None = [{}] * team.size if team.rank == 0 else None
    dist.gather_object(mine, found, dst=team.ranks[0], group=team.host)
    if found is None:
        return None
    merged: dict[int, Entry] = {}
    for entries in found:
        for number, entry in entries.items():
            merged.setdefault(number, {}).update(entry)
    return {**state_dict, "state": merged}


def _whole(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    full: Tensor = value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
    return full.cpu().clone()


def _like(p: Any, value: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
