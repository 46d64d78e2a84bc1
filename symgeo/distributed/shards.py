"""Parameters of which a process holds a part: `torch.distributed.tensor.DTensor`, as `fully_shard` makes them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from symgeo.distributed.processes import Processes


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: where it begins, and its shape."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many entries it has."""
        return prod(self.shape)

    def of(self, x: Tensor) -> Tensor:
        """This part of x, a view.

        >>> import torch
        >>> Box((1, 0), (1, 2)).of(torch.tensor([[1, 2], [3, 4]]))
        tensor([[3, 4]])
        """
        return x[tuple(slice(start, start + length) for start, length in zip(self.offset, self.shape))]


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor.  Reading its class from the loaded modules spares the import where there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """What this process holds of x: its own part, sharing memory, or x itself."""
    if not is_sharded(x):
        return x
    part: Tensor = x.to_local()  # type: ignore[attr-defined]
    return part


def refuse_sharded(params: Mapping[str, Tensor], remedy: str) -> None:
    """Raises ``ValueError`` naming the first sharded tensor, and what to do."""
    for name, p in params.items():
        if is_sharded(p):
            raise ValueError(f"params: {name!r} is sharded over processes, and needed whole; {remedy}")


def refuse_parts(params: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` naming the first tensor of which this process alone does not hold everything."""
    for name, p in params.items():
        if local(p).shape != p.shape:
            raise ValueError(
                f"process_group: parameter {name!r} is sharded, and this process holds {tuple(local(p).shape)} of "
                f"{tuple(p.shape)}; needed the processes that hold it, found one"
            )


@contextmanager
def reducing(sharders: Sequence[Any]) -> Iterator[None]:
    """A context in which every backward pass of these ``FSDPModule``s ends with reduced gradients.

    Whatever ``set_requires_gradient_sync``, ``set_requires_all_reduce`` and ``set_is_last_backward`` had said before
    holds again afterwards.  Raises ``ValueError`` where gradients that are not reduced yet are waiting.
    """
    states = [module._get_fsdp_state() for module in sharders]
    groups = [group for state in states for group in _param_groups(state)]
    if any(_waiting(p) for group in groups for p in group.fsdp_params):
        raise ValueError(
            "model: gradients of a backward pass without synchronisation are waiting to be reduced; finish the "
            "accumulation (set_requires_gradient_sync(True) and a backward pass) before measuring"
        )
    said = [(group.reduce_grads, group.all_reduce_grads) for group in groups]
    last = [state._state_ctx.is_last_backward for state in states]
    for group in groups:
        group.reduce_grads = group.all_reduce_grads = True
    for state in states:
        state._state_ctx.is_last_backward = True
    try:
        yield
    finally:
        for group, (reduce, all_reduce) in zip(groups, said):
            group.reduce_grads, group.all_reduce_grads = reduce, all_reduce
        for state, was in zip(states, last):
            state._state_ctx.is_last_backward = was


def _param_groups(state: Any) -> list[Any]:
    """Torch has a list of them or, in older versions, one or none."""
    found = getattr(state, "_fsdp_param_groups", None)
    if found is not None:
        return list(found)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _waiting(p: Any) -> bool:
    unsharded = getattr(p, "_unsharded_param", None)  # made by the first forward pass
    return p.unsharded_accumulated_grad is not None or (unsharded is not None and unsharded.grad is not None)


def whole(box: Tensor) -> Box:
    """A tensor of which every process has everything."""
    return Box((0,) * box.dim(), tuple(box.shape))


def boxes(params: Mapping[str, Tensor], team: Processes) -> dict[str, list[Box]]:
    """For every parameter the part that each process holds; found once, by asking all of them.

    Raises ValueError naming the parameter for placements that are no boxes (partial sums; one axis cut twice), and
    for a mesh that is not the group of these processes.
    """
    mine = {name: _box(name, p, team) for name, p in params.items()}
    gathered: list[dict[str, Box]] = team.gather(mine)
    return {name: [found[name] for found in gathered] for name in params}


def _box(name: str, p: Tensor, team: Processes) -> Box:
    if not is_sharded(p):
        return whole(p)
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = _layout(p)
    ranks = sorted(mesh.mesh.flatten().tolist())
    if ranks != team.ranks:
        raise ValueError(
            f"parameter {name!r} is sharded over the processes {_listed(ranks)}, but the optimizer's or measurement's "
            f"are {_listed(team.ranks)}; pass process_group= with the former"
        )
    for placement in placements:
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"parameter {name!r} has the placement {placement!r}; needed Shard or Replicate for every dimension of "
                "its mesh, and no axis sharded twice"
            )
    if len({p.dim for p in placements if isinstance(p, Shard)}) < sum(isinstance(p, Shard) for p in placements):
        raise ValueError(f"parameter {name!r}: one axis is sharded over two dimensions of the mesh; use one of them")
    shape, offset = compute_local_shape_and_global_offset(p.shape, mesh, placements)
    return Box(tuple(offset), tuple(shape))


def _layout(p: Any) -> tuple[Any, Any]:
    return p.device_mesh, p.placements


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))
