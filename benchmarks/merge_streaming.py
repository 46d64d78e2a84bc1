"""What merging adapters larger than memory costs: time and memory by the number of modules and of processes.

Three adapters of rank 64 in float16 with the seven projections of a LLaMA of width 2048, independent normal factors, 4
layers (28 modules) and 16 (112 modules); `merge_adapters` by tsvd from folders to folder, in this process alone and
with two workers. Every merge runs in a process of its own, all cases in every round.

  seconds     of the call of `merge_adapters`: the start of workers counts, the import of torch by the caller does not.
  CPU seconds of all processes of the merge; other work on the machine disturbs them less.
  peak MiB    the most that any single process of the merge had resident, libraries included.
  extra MiB   one process: peak above what was resident before the call. Two: peak of the larger worker above that of
              a worker which has merged next to nothing (layers of width 64).
  ratios      between cases of one round.

It needs Linux (/proc), and PEFT to write the adapters.

    python benchmarks/merge_streaming.py [--size small|full] [--rounds 2] [--note TEXT] [--json merge_streaming.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from merge import MIB, Size, measured, memory, write_adapters

from symgeo.merge import merge_adapters, plan_merge

SIZES = {"small": Size(0, 0, 1, 64), "full": Size(0, 0, 4, 2048)}
RANK = 64
TINY = Size(0, 0, 1, 64)
MORE = 4  # times the modules
PROCESSES = (1, 2)
LIMITS = {"seconds, 4 x modules": "at most 6", "peak MiB, 4 x modules": "at most 1.1"}


def one(folder: Path, processes: int) -> dict[str, float]:
    """Merges the adapters below a folder, after a merge of next to nothing by the same number of processes."""
    folders = sorted(folder.glob("adapter?"))
    small = sorted((folder.parent / "tiny").glob("adapter?"))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        merge_adapters(small, Path(out) / "small", processes=processes)
        workers = resource.getrusage(resource.RUSAGE_CHILDREN)
        before = workers.ru_maxrss * 1024 if processes > 1 else memory("VmRSS")
        result, _ = measured(lambda: merge_adapters(folders, Path(out) / "merged", processes=processes))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = after.ru_maxrss * 1024 if processes > 1 else memory("VmHWM")
    return {
        "seconds": result["seconds"],
        "CPU seconds": result["CPU seconds"] + sum(after[:2]) - sum(workers[:2]),  # of users and of the system
        "peak MiB": max(peak, memory("VmHWM")) / MIB,
        "extra MiB": (peak - before) / MIB,
    }


def case(folder: Path, processes: int) -> dict[str, float]:
    """:func:`one` in a fresh process."""
    command = [sys.executable, __file__, "--part", str(folder), str(processes)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr}")
    result: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    print(folder.name, processes, result, file=sys.stderr)
    return result


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """All cases in every round, and the medians of what they show."""
    sizes = {"few": size, "many": replace(size, layers=MORE * size.layers)}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in ("tiny", *sizes)}
        write_adapters(TINY, folders["tiny"], 8)
        described = {name: describe(write_adapters(given, folders[name], RANK)) for name, given in sizes.items()}
        found = [{(name, n): case(folders[name], n) for name in sizes for n in PROCESSES} for _ in range(rounds)]
    return {
        name: about | {f"{n} processes": medians(found, (name, n)) for n in PROCESSES}
        for name, about in described.items()
    } | {"ratios (median of rounds)": ratios(found), "wanted": LIMITS}


def describe(folders: list[Path]) -> dict[str, float]:
    """What there is to merge."""
    plan = plan_merge(folders)
    return {
        "modules": len(plan.modules),
        "adapters MiB": sum(adapter.file.stat().st_size for adapter in plan.adapters) / MIB,
        "factors in float64 MiB": sum(module.bytes for module in plan.modules) / MIB,
        "planned MiB of each process": plan.memory_bytes / MIB,
    }


Found = list[dict[tuple[str, int], dict[str, float]]]


def medians(found: Found, key: tuple[str, int]) -> dict[str, float]:
    """Of every figure of a case."""
    return {what: statistics.median(cases[key][what] for cases in found) for what in found[0][key]}


def ratios(found: Found) -> dict[str, float]:
    """Many modules to few, and two processes to one."""

    def ratio(what: str, over: tuple[str, int], under: tuple[str, int]) -> float:
        return statistics.median(cases[over][what] / cases[under][what] for cases in found)

    grown = {
        f"{what}, {MORE} x modules, {n} processes": ratio(what, ("many", n), ("few", n))
        for n in PROCESSES
        for what in ("seconds", "CPU seconds", "peak MiB", "extra MiB")
    }
    spread = {
        f"{what}, 2 processes / 1, {name} modules": ratio(what, (name, 2), (name, 1))
        for name in ("few", "many")
        for what in ("seconds", "CPU seconds")
    }
    return grown | spread


def main() -> None:
    """Runs the benchmark, prints the result and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--note", default="", help="circumstances, such as other work on the machine")
    parser.add_argument("--json", type=Path, help="default: merge_streaming.json beside this file, full size only")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(one(Path(options.part[0]), int(options.part[1]))))
        return
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    head = {"size": options.size, "machine": machine, "rounds": options.rounds, "note": options.note}
    text = json.dumps(head | measure(SIZES[options.size], options.rounds), indent=2) + "\n"
    target = options.json or (Path(__file__).with_suffix(".json") if options.size == "full" else None)
    if target is not None:
        target.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
