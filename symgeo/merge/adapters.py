"""``merge_adapters``: folders of LoRA adapters in, one folder out, without the base model."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from symgeo.merge.batch import MergedBatch, merge_batch
from symgeo.merge.peft.card import model_card
from symgeo.merge.peft.config import CONFIG
from symgeo.merge.peft.folder import check_target, new_folder
from symgeo.merge.peft.plan import MergePlan, ModulePlan
from symgeo.merge.peft.planning import plan_merge
from symgeo.merge.peft.reader import WEIGHTS, opened
from symgeo.merge.peft.tensors import TensorFile
from symgeo.parallel import one_thread
from symgeo.report import SCHEMA, plain, versions

Progress = Callable[[int, int, str], None]
REPORT = "symgeo_report.json"
LISTED = 3  # warnings that a summary quotes


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: one row for every module in ``modules``, and the folder ``out`` that holds the result.

    A row has at least ``module, method, rank, converged, iterations, retained_energy, spectral_gap, warnings,
    fallback``.  ``notes`` concern the merge as a whole.  ``str()`` is a summary.
    """

    out: Path
    settings: dict[str, Any]
    inputs: list[dict[str, Any]]
    modules: list[dict[str, Any]]
    base_model: str | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report in the types of JSON."""
        document: dict[str, Any] = plain({"out": self.out, **self.document()})
        return document

    def document(self) -> dict[str, Any]:
        """What is written beside the adapter: the same for the same merge, wherever and whenever it is done."""
        return {
            "schema": SCHEMA,
            "tool": "symgeo",
            "command": "merge",
            "versions": versions(),
            "settings": self.settings,
            "base_model": self.base_model,
            "inputs": self.inputs,
            "notes": self.notes,
            "modules": self.modules,
        }

    def summary(self) -> str:
        """Counts, ranks, the module that kept least, and the first warnings."""
        written = [row for row in self.modules if row["rank"]]
        counts = {rank: sum(row["rank"] == rank for row in written) for rank in sorted({r["rank"] for r in written})}
        lines = [
            f"modules          {len(written)}",
            f"rank             {', '.join(f'{rank} ({count} modules)' for rank, count in counts.items())}",
        ]
        kept = sorted((e, row["module"]) for row in written if (e := row["retained_energy"]) is not None)
        if kept:
            middle = statistics.median(energy for energy, _ in kept)
            lines.append(f"retained energy  {kept[0][0]:.4f} at worst ({kept[0][1]}), median {middle:.4f}")
        fallen = sum(row["fallback"] is not None for row in written)
        unfinished = sum(not row["converged"] for row in written)
        lines += [f"fallback         {fallen} modules by another method"] * bool(fallen)
        lines += [f"not converged    {unfinished} modules"] * bool(unfinished)
        warned = [(row["module"], text) for row in self.modules for text in row["warnings"]]
        lines += [f"warning          {module}: {text}" for module, text in warned[:LISTED]]
        lines += [f"                 and {len(warned) - LISTED} more warnings"] * (len(warned) > LISTED)
        return "\n".join([*lines, *(f"note             {note}" for note in self.notes)])

    def __str__(self) -> str:
        head = f"{len(self.inputs)} adapters merged by {self.settings['method']} into {self.out}"
        return f"{head}\n{self.summary()}"


def merge_adapters(
    folders: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    method: str = "tsvd",
    rank: int | str = "max",
    scale: float = 1.0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> MergeReport:
    """Merges LoRA adapters, folders as PEFT saves them, into the new folder ``out``.

    The update ``Delta_i = s_i B_i A_i`` of every module is what is merged, with all conventions of scaling folded
    in; the merged configuration has scale one.  ``weights``, ``method``, ``rank``, ``scale`` and ``seed``:
    :func:`symgeo.merge.merge_factors`.  A module that only some adapters have counts as zero in a sum, and is
    averaged over those adapters in a mean; its row says so.  The result does not depend on the order in which
    modules are worked on.

    dtype : of the merged factors, by default that of the inputs, float32 if they differ.  All computation is in
    float64, on ``device`` (the CPU by default, on one thread: the matrices are small), a few modules at a time.
    overwrite : replace ``out`` if it is a folder that is not empty; it is removed only when its successor is whole.
    progress : called as ``progress(done, total, module)``;  say : called with messages about leftovers.

    Raises ``ValueError`` naming the folder and the field or tensor for anything but plain LoRA, for adapters that do
    not fit each other, and for an ``out`` that cannot be written; ``out`` then is as it was.
    """
    plan = plan_merge(folders, weights, method, rank, scale, dtype, seed)
    place = _place(device)
    check_target(out, plan.sources, overwrite)
    with new_folder(out, plan.sources, overwrite, say) as folder:
        with one_thread(), TensorFile(folder / WEIGHTS, plan.tensors()) as file:
            rows = list(_merge(plan, place, file, progress))
        report = _report(plan, Path(out), rows)
        _write_texts(folder, plan, report)
    return report


def _place(device: str | torch.device | None) -> torch.device:
    try:
        return torch.zeros(1, dtype=torch.float64, device=device or "cpu").device
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device}: it cannot compute in float64 here ({reason}); use cpu") from error


def _merge(
    plan: MergePlan, device: torch.device, file: TensorFile, progress: Progress | None
) -> Iterator[dict[str, Any]]:
    done = 0
    for batch in plan.batches(device.type):
        merged = _merge_modules(plan, batch, device)
        for i, module in enumerate(batch):
            for key, x, shape in zip(module.pair.keys, (merged.A[i], merged.B[i]), module.shapes):
                file.write(key, _stored(x.reshape(shape), plan.dtype, key))
            yield row(plan, module, merged.reports[i])
        done += len(batch)
        if progress is not None:
            progress(done, len(plan.kept), batch[-1].module)
    for module in plan.modules:
        if module.dropped:
            yield row(plan, module, {"method": plan.method, "rank": 0, "converged": True, "iterations": 0,
                                     "retained_energy": 1.0, "spectral_gap": None, "fallback": None, "warnings":
                                     ["every adapter that has this module has weight zero: left out"]})  # fmt: skip
    for key, base in plan.base_tensors.items():
        with opened(base.source.folder) as stored:
            file.write(key, stored.get_tensor(key))


def _merge_modules(plan: MergePlan, batch: Sequence[ModulePlan], device: torch.device) -> MergedBatch:
    first, names = batch[0], [module.module for module in batch]
    factors = [plan.adapters[i].factors(names, device) for i in first.holders]
    seeds = [module_seed(plan.seed, name) for name in names]
    try:
        merged = merge_batch(factors, first.weights, plan.method, plan.rank, plan.scale, seeds)
    except ValueError as error:
        others = f" and {len(batch) - 1} of its shape" if len(batch) > 1 else ""
        raise ValueError(f"module {names[0]}{others}: {error}") from error
    return merged


def _stored(x: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    stored = x.to(device="cpu", dtype=dtype)
    if not bool(torch.isfinite(stored).all()):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"tensor {key}: the merge is not finite in {name}; write it in a wider dtype (--dtype float32)"
        )
    return stored


def module_seed(seed: int, module: str) -> int:
    """A seed for one module, from the seed of the merge and its name alone.

    >>> module_seed(0, "layers.0.q_proj") == module_seed(0, "layers.0.q_proj") != module_seed(1, "layers.0.q_proj")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{module}".encode()).digest()[:6], "little")


def row(plan: MergePlan, module: ModulePlan, report: Mapping[str, Any]) -> dict[str, Any]:
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


def _report(plan: MergePlan, out: Path, rows: list[dict[str, Any]]) -> MergeReport:
    inputs = [
        {"folder": adapter.given, "name": adapter.folder.resolve().name, "weight": weight, "sha256": adapter.sha256()}
        for adapter, weight in zip(plan.adapters, plan.weights)
    ]
    ordered = sorted(rows, key=lambda row: row["module"])
    return MergeReport(out, plan.settings(), inputs, ordered, plan.base_model, list(plan.notes))


def _write_texts(folder: Path, plan: MergePlan, report: MergeReport) -> None:
    card = model_card(report.settings, report.inputs, plan.base_model, versions(), report.summary())
    for name, text in (
        (CONFIG, json.dumps(plan.config, indent=2, sort_keys=True) + "\n"),
        ("README.md", card),
        (REPORT, json.dumps(plain(report.document()), indent=2, allow_nan=False) + "\n"),
    ):
        (folder / name).write_text(text, encoding="utf-8")
