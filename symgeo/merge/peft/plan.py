"""The plan of a merge: what is read, what becomes of every module, and what will be written.  No tensor is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from symgeo.merge.methods import MEANS
from symgeo.merge.peft.reader import Adapter, Pair
from symgeo.report import aligned

# float64 factors that are worked on at once, where a single module has fewer, by the type of the device
BATCH_BYTES = {"cpu": 2**23, "cuda": 2**28}
WORKING = 6  # bytes of memory for each of these


@dataclass(frozen=True)
class ModulePlan:
    """One merged module: ``holders`` are the indices of the adapters that have it, with their ``ranks``."""

    pair: Pair
    holders: tuple[int, ...]
    ranks: tuple[int, ...]
    weights: tuple[float, ...]
    rank: int

    @property
    def module(self) -> str:
        """Its name in the base model."""
        return self.pair.module

    @property
    def dropped(self) -> bool:
        """Whether all adapters that have it have weight zero, so that nothing of it is left."""
        return not any(self.weights)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the merged A and B on disk."""
        return (self.rank, *self.pair.a_shape[1:]), (self.pair.b_shape[0], self.rank, *self.pair.b_shape[2:])

    @property
    def bucket(self) -> tuple[object, ...]:
        """What modules of one batch have in common."""
        return self.pair.rows, self.pair.columns, self.holders, self.ranks

    @property
    def bytes(self) -> int:
        """Size of its factors in float64."""
        return 8 * (self.pair.rows + self.pair.columns) * sum(self.ranks)

    @property
    def cost(self) -> int:
        """Its work, to compare it with that of others: ``(m + n) k^2 + k^3``, where k is the sum of the ranks.

        That is the order of the factorisations which all methods begin with.
        """
        k = sum(self.ranks)
        return (self.pair.rows + self.pair.columns + k) * k**2


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base model that the adapters carry along: copied from one of them, not merged."""

    source: Adapter
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class MergePlan:
    """What :func:`symgeo.merge.merge_adapters` is going to do; ``str()`` is a table."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    method: str
    rank: int | str
    scale: float
    dtype: torch.dtype
    seed: int
    modules: tuple[ModulePlan, ...]
    base_tensors: dict[str, BaseTensor]
    base_model: str | None
    config: dict[str, Any]
    notes: tuple[str, ...]
    processes: int = 1  # at most; there are never more than batches

    @property
    def sources(self) -> list[Path]:
        """All folders that are read."""
        return [path for adapter in self.adapters for path in (Path(adapter.given), adapter.folder)]

    @property
    def mean(self) -> bool:
        """Whether the method is a mean, which normalises the weights of those that have a module."""
        return self.method in MEANS

    @property
    def kept(self) -> tuple[ModulePlan, ...]:
        """The modules that are written."""
        return tuple(module for module in self.modules if not module.dropped)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes of all tensors to be written."""
        merged = {key: (self.dtype, shape) for m in self.kept for key, shape in zip(m.pair.keys, m.shapes)}
        return merged | {key: (base.dtype, base.shape) for key, base in self.base_tensors.items()}

    @property
    def output_bytes(self) -> int:
        """Size of the merged tensors."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors().values())

    @property
    def memory_bytes(self) -> int:
        """Estimate of the memory that the merge takes on a CPU, beside what the libraries take in every process.

        A process works on one batch at a time: it is the largest batch of each of them, however many there are.
        """
        return WORKING * sum(max(sum(m.bytes for m in batch) for batch in share) for share in self.shares())

    def batches(self, device: str = "cpu") -> Iterator[list[ModulePlan]]:
        """The modules to merge, those of equal shape together as far as memory is bounded."""
        buckets: dict[tuple[object, ...], list[ModulePlan]] = {}
        for module in self.kept:
            buckets.setdefault(module.bucket, []).append(module)
        for bucket in buckets.values():
            size = max(1, BATCH_BYTES.get(device, BATCH_BYTES["cpu"]) // bucket[0].bytes)
            yield from (bucket[i : i + size] for i in range(0, len(bucket), size))

    def shares(self, device: str = "cpu") -> list[list[list[ModulePlan]]]:
        """The batches of every process: those with most work first, each to the process that has least to do.

        The batches are the same for any number of processes, so that results are; there is no process without one.
        """
        batches = list(self.batches(device))
        costs = [sum(module.cost for module in batch) for batch in batches]
        loads = [0] * min(self.processes, len(batches))
        dealt: list[list[int]] = [[] for _ in loads]
        for i in sorted(range(len(batches)), key=lambda i: (-costs[i], i)):
            least = loads.index(min(loads))
            loads[least] += costs[i]
            dealt[least].append(i)
        return [[batches[i] for i in sorted(numbers)] for numbers in dealt]

    def to_dict(self) -> dict[str, Any]:
        """The plan in the types of JSON."""
        return {
            "settings": self.settings(),
            "adapters": [str(adapter.folder) for adapter in self.adapters],
            "base_model": self.base_model,
            "modules": [
                {
                    "module": m.module,
                    "shape": [m.pair.rows, m.pair.columns],
                    "ranks": {self.adapters[i].given: r for i, r in zip(m.holders, m.ranks)},
                    "rank": 0 if m.dropped else m.rank,
                }
                for m in self.modules
            ],
            "base_tensors": list(self.base_tensors),
            "output_bytes": self.output_bytes,
            "memory_bytes": self.memory_bytes,
            "processes": len(self.shares()),
            "config": self.config,
            "notes": list(self.notes),
        }

    def settings(self) -> dict[str, Any]:
        """The options of the merge, as they were resolved."""
        return {
            "method": self.method,
            "weights": list(self.weights),
            "rank": self.rank,
            "scale": self.scale,
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": self.seed,
        }

    def __str__(self) -> str:
        header = ["modules", "shape", "ranks", "rank", "example"]
        groups: dict[tuple[object, ...], list[ModulePlan]] = {}
        for m in self.modules:
            groups.setdefault((*m.bucket, m.dropped), []).append(m)
        rows = [
            [
                str(len(group)),
                f"{group[0].pair.rows} x {group[0].pair.columns}",
                ", ".join(map(str, group[0].ranks)),
                "left out" if group[0].dropped else str(group[0].rank),
                group[0].module,
            ]
            for group in groups.values()
        ]
        count = len(self.shares())
        lines = [
            f"{len(self.kept)} modules of {len(self.adapters)} adapters, method {self.method}, "
            f"weights {', '.join(f'{w:g}' for w in self.weights)}, base model {self.base_model or 'not named'}",
            aligned(header, rows, left=5),
            f"tensors to write {self.output_bytes / 2**20:.1f} MiB ({str(self.dtype).removeprefix('torch.')}), "
            f"working memory about {self.memory_bytes / 2**20:.0f} MiB" + f" in {count} processes" * (count > 1),
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
