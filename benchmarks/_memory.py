"""What a piece of work adds to the memory of a process, at its peak: read off Linux, or counted tensor by tensor."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def growth(work: Callable[[], object]) -> float:
    """MiB that the resident set of this process grows by in one call, at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what preparing has freed is given back, not used again unseen,
    Path("/proc/self/clear_refs").write_text("5")  # and its peak is forgotten
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages of all tensors that operations inside have made and that are still alive, at their peak.

    known : tensors that are there already.  What an operation needs inside itself is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now, self.peak, self._seen = 0, 0, weakref.WeakSet(x.untyped_storage() for x in known)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), keywords: Any = None) -> Any:
        out = function(*args, **(keywords or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage() not in self._seen:
                storage = x.untyped_storage()
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def live_bytes(work: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """The peak of `LiveBytes` over one call: the same number every time."""
    gc.collect()
    with LiveBytes(known) as counter:
        work()
    return counter.peak


class MovedBytes(TorchDispatchMode):
    """Bytes that operations inside read and write: the sizes of what they take and give, views of it apart."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), keywords: Any = None) -> Any:
        out = function(*args, **(keywords or {}))
        taken, given = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, keywords), out))
        held = {x.untyped_storage().data_ptr() for x in taken}
        view = not function._schema.is_mutable and all(x.untyped_storage().data_ptr() in held for x in given)
        if not view:
            self.total += sum(x.nbytes for x in (*taken, *given))
        return out


def moved_bytes(work: Callable[[], object]) -> int:
    """The total of `MovedBytes` over one call."""
    with MovedBytes() as counter:
        work()
    return counter.total


def resident(field: str) -> float:
    """A size of this process in MiB, by Linux; unlike `ru_maxrss` it starts anew in a child."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 1024


def in_child(*arguments: str) -> float:
    """The number that a script prints last, in a fresh process; raises `RuntimeError` where it fails."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])
