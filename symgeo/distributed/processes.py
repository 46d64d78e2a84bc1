"""The processes that share a job: numbers they agree on, and failures that all of them learn of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: one for each group, kept: its messages between hosts may need a group of their own
_KNOWN: dict[Any, Processes] = {}


class PeerError(RuntimeError):
    """Another process failed in a step that all of them take together."""


class _PeerFailed(Exception):
    """Seen in a reduction, before anyone has said why."""


class Processes:
    """A group of processes that run the same steps.

    Messages between hosts go through gloo, so that no device is waited for; reductions of tensors go through the
    group itself.

    Attributes
    ----------
    group: of torch.distributed; host: the same for messages between hosts; rank, size: the number of this process, and
        how many there are; ranks: their global numbers in ascending order
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.ranks = sorted(dist.get_process_group_ranks(group))
        same = dist.get_backend(group) == "gloo"
        self.host = group if same else dist.new_group(self.ranks, backend="gloo", use_local_synchronization=True)

    def gather(self, message: Any) -> list[Any]:
        """What every process says, in their order; anything that can be pickled."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, message, group=self.host)
        return found

    def bits(self, mine: Sequence[bool]) -> list[list[bool]]:
        """The same for a few bits, which travel faster."""
        sent = torch.tensor(mine, dtype=torch.uint8)
        found = torch.empty(self.size * len(sent), dtype=torch.uint8)
        all_gather(found, sent, self.host)
        return [[bool(bit) for bit in row] for row in found.reshape(self.size, -1).tolist()]

    def maximum(self, x: Tensor) -> Tensor:
        """The largest x (one number each) of all processes.

        On a CPU it also tells whether another process has failed, and then raises.
        """
        if x.device.type != "cpu":
            found = x.detach().clone()
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
            return found
        found, failed = self._vote(x.detach().double(), False)
        if failed:
            raise _PeerFailed
        return found.to(x.dtype)

    def mean_(self, x: Tensor) -> Tensor:
        """The mean of all processes, in place."""
        dist.all_reduce(x, group=self.group)
        return x.div_(self.size)

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes take this step, or none: whatever one of them raises, the others raise as `PeerError`.

        The body may call `maximum` and no other collective.
        """
        reason = None
        try:
            yield
        except _PeerFailed:
            reason = ""
        except Exception as error:
            self._vote(torch.zeros((), dtype=torch.float64), True)
            self.gather(f"{type(error).__name__}: {error}")
            raise
        else:
            reason = "" if self._vote(torch.zeros((), dtype=torch.float64), False)[1] else None
        if reason is not None:
            said = self.gather(reason)
            rank = next(i for i, text in enumerate(said) if text)
            raise PeerError(f"process {self.ranks[rank]} failed, and all stopped with it: {said[rank]}")

    def _vote(self, value: Tensor, failed: bool) -> tuple[Tensor, bool]:
        both = torch.stack([value.reshape(()), torch.tensor(float(failed), dtype=torch.float64)])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.host)
        return both[0], bool(both[1])


def processes(group: Any = None) -> Processes | None:
    """The processes of a group, by default all of them; None where there is just one, or ``group`` is False.

    Raises ValueError for something that is no group of this process.
    """
    if group is False or not (dist.is_available() and dist.is_initialized()):
        return None
    found = dist.group.WORLD if group is None or group is True else group
    if found is None or dist.get_rank(found) < 0:
        raise ValueError("process_group: this process is not in the group that was given")
    if dist.get_world_size(found) == 1:
        return None
    if found not in _KNOWN:
        _KNOWN[found] = Processes(found)
    return _KNOWN[found]


def all_gather(out: Tensor, x: Tensor, group: Any) -> None:
    """Equal pieces of all processes, one behind the other (the function has two names in torch)."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x, group=group)
