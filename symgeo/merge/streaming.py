"""Batches of modules from adapter folders into the merged file: one batch is in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from symgeo.merge.batch import MergedBatch, merge_batch
from symgeo.merge.peft.plan import MergePlan, ModulePlan
from symgeo.merge.peft.reader import opened
from symgeo.merge.peft.tensors import TensorFile

Row = dict[str, Any]


def merge_into(file: TensorFile, plan: MergePlan, batch: Sequence[ModulePlan], device: torch.device) -> list[Row]:
    """Read a batch, merge it and write it to its place; the rows of its report.

    Raises ``ValueError`` naming the module or the tensor that cannot be merged or written.
    """
    merged = _merge_modules(plan, batch, device)
    for i, module in enumerate(batch):
        for key, x, shape in zip(module.pair.keys, (merged.A[i], merged.B[i]), module.shapes):
            file.write(key, _stored(x.reshape(shape), plan.dtype, key))
    return [row(plan, module, report) for module, report in zip(batch, merged.reports)]


def left_out(plan: MergePlan) -> list[Row]:
    """The rows of modules of which nothing is left."""
    report = {
        "method": plan.method,
        "rank": 0,
        "converged": True,
        "iterations": 0,
        "retained_energy": 1.0,
        "spectral_gap": None,
        "fallback": None,
        "warnings": ["every adapter that has this module has weight zero: left out"],
    }
    return [row(plan, module, report) for module in plan.modules if module.dropped]


def copy_base_tensors(file: TensorFile, plan: MergePlan) -> None:
    """Write the tensors of the base model as they are."""
    for key, base in plan.base_tensors.items():
        with opened(base.source.folder) as stored:
            file.write(key, stored.get_tensor(key))


def named(batch: Sequence[ModulePlan]) -> str:
    """A batch, for messages: its first module, and how many more of equal shape."""
    return f"module {batch[0].module}" + (f" and {len(batch) - 1} of its shape" if len(batch) > 1 else "")


def module_seed(seed: int, module: str) -> int:
    """A seed for one module, from the seed of the merge and its name alone.

    >>> module_seed(0, "layers.0.q_proj") == module_seed(0, "layers.0.q_proj") != module_seed(1, "layers.0.q_proj")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{module}".encode()).digest()[:6], "little")


def row(plan: MergePlan, module: ModulePlan, report: Mapping[str, Any]) -> Row:
    """The report of a module, with its name, its shape, and a warning if only some adapters have it."""
    warnings = list(report["warnings"])
    if len(module.holders) < len(plan.adapters) and not module.dropped:
        how = "averaged over those" if plan.mean else "zero for the others"
        warnings.insert(0, f"only {len(module.holders)} of {len(plan.adapters)} adapters have this module: {how}")
    return {
        "module": module.module,
        "shape": [module.pair.rows, module.pair.columns],
        "adapters": list(module.holders),
        "input_ranks": list(module.ranks),
        **report,
        "warnings": warnings,
    }


def _merge_modules(plan: MergePlan, batch: Sequence[ModulePlan], device: torch.device) -> MergedBatch:
    first, names = batch[0], [module.module for module in batch]
    factors = [plan.adapters[i].factors(names, device) for i in first.holders]
    seeds = [module_seed(plan.seed, name) for name in names]
    try:
        return merge_batch(factors, first.weights, plan.method, plan.rank, plan.scale, seeds)
    except ValueError as error:
        raise ValueError(f"{named(batch)}: {error}") from error


def _stored(x: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    stored = x.to(device="cpu", dtype=dtype)
    if not bool(torch.isfinite(stored).all()):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"tensor {key}: the merge is not finite in {name}; write it in a wider dtype (--dtype float32)"
        )
    return stored
