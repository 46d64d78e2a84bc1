"""What a piece of work adds to the memory of a process, at its peak; and the same in a fresh process.  Linux."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def growth(work: Callable[[], object]) -> float:
    """MiB that the resident set of this process grows by in one call, at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what preparing has freed is given back, not used again unseen,
    Path("/proc/self/clear_refs").write_text("5")  # and its peak is forgotten
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


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
