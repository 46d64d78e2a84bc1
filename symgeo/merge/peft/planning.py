"""From adapter folders and options to a plan: everything that can be refused before a factor is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from symgeo.merge.methods import FACTORWISE, MEANS, NAMES
from symgeo.merge.peft.agreement import agree, common_dtype, shared_base_tensors
from symgeo.merge.peft.output_config import merged_config
from symgeo.merge.peft.plan import MergePlan, ModulePlan
from symgeo.merge.peft.reader import DTYPES, Adapter, read_adapter
from symgeo.merge.problem import check_weights, output_rank


def plan_merge(
    folders: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    method: str = "tsvd",
    rank: int | str = "max",
    scale: float = 1.0,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    processes: int = 1,
) -> MergePlan:
    """Check adapters and options as :func:`symgeo.merge.merge_adapters` does, and say what it would do.

    Raises ``ValueError`` for everything that can be refused without reading the factors themselves.
    """
    if isinstance(folders, (str, Path)) or not folders:
        raise ValueError(f"folders: needed a list with at least one adapter folder; got {folders!r}")
    if method not in NAMES:
        raise ValueError(f"method must be one of {', '.join(NAMES)}; got {method!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number; got {scale}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer; got {seed!r}")
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise ValueError(f"processes must be an integer >= 1; got {processes!r}")
    check_weights(weights, len(folders), mean=method in MEANS)
    used = [1.0 / len(folders)] * len(folders) if weights is None else [float(w) for w in weights]
    adapters = [read_adapter(folder) for folder in folders]
    shared = agree(adapters)
    names = sorted({module for adapter in adapters for module in adapter.pairs})
    modules = tuple(_module(name, adapters, used, method, rank) for name in names)
    ranks = {m.module: m.rank for m in modules if not m.dropped}
    return MergePlan(
        adapters=tuple(adapters),
        weights=tuple(used),
        method=method,
        rank=rank,
        scale=float(scale),
        dtype=common_dtype(adapters) if dtype is None else _dtype(dtype),
        seed=seed,
        modules=modules,
        base_tensors=shared_base_tensors(adapters, ranks),
        base_model=shared.base_model,
        config=merged_config(ranks, adapters, shared.fields),
        notes=shared.notes,
        processes=processes,
    )


def _module(
    name: str, adapters: Sequence[Adapter], weights: Sequence[float], method: str, rank: int | str
) -> ModulePlan:
    holders = tuple(i for i, adapter in enumerate(adapters) if name in adapter.pairs)
    pairs = [adapters[i].pairs[name] for i in holders]
    ranks = tuple(pair.rank for pair in pairs)
    merged = output_rank(rank, ranks, pairs[0].rows, pairs[0].columns)
    if method in FACTORWISE:  # these keep the ranks of the factors
        merged = sum(ranks) if method == "cat" else max(ranks)
    return ModulePlan(pairs[0], holders, ranks, tuple(weights[i] for i in holders), merged)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    named = {str(d).removeprefix("torch."): d for d in DTYPES.values()}
    found = named.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype must be one of {', '.join(named)}; got {dtype!r}")
    return found
