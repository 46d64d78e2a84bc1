"""The processes that share a job: numbers they agree on, and failures that all of them learn of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
        self._enqueued = 0  # reductions on a device since the last `together` began
        self._announced = 0  # bodies of `announcing` so far

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
        if not _waits(x.device):
            self._enqueued += 1
            found = x.detach().to(torch.float64, copy=True)
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
            return found.to(x.dtype)
        found, failed = self._vote(x.detach().double(), False)
        if failed:
            raise _PeerFailed
        return found.to(x.dtype)

    def mean_(self, x: Tensor) -> Tensor:
        """The mean of all processes, in place."""
        return self.sum_(x).div_(self.size)

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        sent = x.contiguous()  # in one order of entries everywhere, whatever the strides
        dist.all_reduce(sent, group=self.group)
        return x if sent is x else x.copy_(sent)

    @contextmanager
    def together(self, device: torch.device | None = None) -> Iterator[None]:
        """All processes take this step, or none: whatever one of them raises, the others raise as `PeerError`.

        The body may call `maximum` of numbers on `device`, and no other collective.  The reductions on a device that a
        process has missed when it failed it makes up for, so that the next collective there is the same one for all.
        """
        self._enqueued, failed = 0, False
        try:
            yield
        except _PeerFailed:
            failed = True
        except Exception as error:
            with suppress(RuntimeError):  # nobody is left to be told
                self._vote(torch.zeros((), dtype=torch.float64), True)
                self._explain(f"{type(error).__name__}: {error}", device)
            raise
        else:
            failed = self._vote(torch.zeros((), dtype=torch.float64), False)[1]
        if failed:
            said = self._explain("", device)
            rank = next(i for i, text in enumerate(said) if text)
            raise PeerError(f"process {self.ranks[rank]} failed, and all stopped with it: {said[rank]}")

    @contextmanager
    def announcing(self) -> Iterator[None]:
        """All processes get through this body, or none goes on: whatever one raises, the others raise as `PeerError`.

        The body may have collectives of its own.  A process that fails leaves a note in the store of the group and
        raises at once; the others read it when they are through.  Where they are in a collective that the failed
        process never joins, they stay in it until that process ends or the time of the group is over.
        """
        from torch.distributed.distributed_c10d import _get_process_group_store  # not in every build of torch

        store = _get_process_group_store(self.group)
        number, self._announced = self._announced, self._announced + 1
        note = f"symgeo announces {number} "
        try:
            yield
        except Exception as error:
            store.set(f"{note}{self.rank}", f"!{type(error).__name__}: {error}")
            raise
        store.set(f"{note}{self.rank}", ".")
        keys = [f"{note}{rank}" for rank in range(self.size)]
        store.wait(keys)
        said = [store.get(key).decode() for key in keys]
        if number:
            store.delete_key(f"symgeo announces {number - 1} {self.rank}")  # all have read it
        for rank, text in zip(self.ranks, said):
            if text != ".":
                raise PeerError(f"process {rank} failed, and all stopped with it: {text[1:]}")

    def _explain(self, reason: str, device: torch.device | None) -> list[str]:
        """Why each process failed, if it did; all of them enqueue equally many reductions."""
        said = self.gather((reason, self._enqueued))
        for _ in range(max(count for _, count in said) - self._enqueued):
            self.maximum(torch.zeros((), dtype=torch.float64, device=device))
        return [text for text, _ in said]

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
    return _processes(found)


@cache
def _processes(group: Any) -> Processes:
    """One object for each group, for good: its messages between hosts may need a group of their own."""
    return Processes(group)


def _waits(device: torch.device) -> bool:
    """Whether a reduction of numbers there has ended when the call returns."""
    return device.type == "cpu"


def all_gather(out: Tensor, x: Tensor, group: Any) -> None:
    """Equal pieces of all processes, one behind the other (the function has two names in torch)."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x, group=group)
