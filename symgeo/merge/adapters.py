"""``merge_adapters``: folders of LoRA adapters in, one folder out, without the base model."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from symgeo.merge.messages import Share
from symgeo.merge.peft.card import model_card
from symgeo.merge.peft.config import CONFIG
from symgeo.merge.peft.folder import check_target, new_folder
from symgeo.merge.peft.plan import MergePlan, ModulePlan
from symgeo.merge.peft.planning import plan_merge
from symgeo.merge.peft.reader import WEIGHTS
from symgeo.merge.peft.tensors import TensorFile
from symgeo.merge.processes import Progress, merge_on_processes
from symgeo.merge.streaming import Row, copy_base_tensors, left_out, merge_into
from symgeo.parallel import one_thread
from symgeo.report import SCHEMA, plain, versions

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
    processes: int = 1,
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
    processes : with more than one, as many worker processes share the batches of modules, each with one thread and
    one batch in memory, and write into one file; no more of them than batches.  What is written is the same, byte for
    byte, as by one process (with ``device="cuda"``, where the devices are of one kind).  A worker first imports torch,
    which takes seconds, so that a merge of seconds gains nothing.  They take the visible devices in turn for
    ``device="cuda"``; one that is named with a number, as "cuda:1", is shared by all.

    Raises ``ValueError`` naming the folder and the field or tensor for anything but plain LoRA, for adapters that do
    not fit each other, for an ``out`` that cannot be written, and for a worker process that fails or is killed, which
    ends the others; ``out`` then is as it was.
    """
    plan = plan_merge(folders, weights, method, rank, scale, dtype, seed, processes)
    place = _place(device)
    check_target(out, plan.sources, overwrite)
    with new_folder(out, plan.sources, overwrite, say) as folder:
        with one_thread(), TensorFile(folder / WEIGHTS, plan.tensors()) as file:
            rows = _merge(plan, device, place, file, progress)
        report = _report(plan, Path(out), rows)
        _write_texts(folder, plan, report)
    return report


def _place(device: str | torch.device | None) -> torch.device:
    try:
        return torch.zeros(1, dtype=torch.float64, device=device or "cpu").device
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device}: it cannot compute in float64 here ({reason}); use cpu") from error


def devices(asked: str | torch.device | None, place: torch.device, count: int) -> list[str]:
    """The devices of ``count`` processes: the one that was asked for; the visible ones in turn for plain "cuda".

    >>> devices("cpu", torch.device("cpu"), 3)
    ['cpu', 'cpu', 'cpu']
    """
    if asked is None or place.type != "cuda" or torch.device(asked).index is not None:
        return [str(place)] * count
    return [f"cuda:{i % torch.cuda.device_count()}" for i in range(count)]


def _merge(
    plan: MergePlan, device: str | torch.device | None, place: torch.device, file: TensorFile, progress: Progress | None
) -> list[Row]:
    parts = plan.shares(place.type)
    if len(parts) > 1:
        places = devices(device, place, len(parts))
        shares = [Share(plan, batches, file.path, where) for batches, where in zip(parts, places)]
        rows = merge_on_processes(plan, shares, file, progress)
    else:
        rows = _merge_here(plan, parts[0], place, file, progress)
    copy_base_tensors(file, plan)
    return rows + left_out(plan)


def _merge_here(
    plan: MergePlan,
    batches: Sequence[Sequence[ModulePlan]],
    place: torch.device,
    file: TensorFile,
    progress: Progress | None,
) -> list[Row]:
    rows: list[Row] = []
    for batch in batches:
        rows += merge_into(file, plan, batch, place)
        if progress is not None:
            progress(len(rows), len(plan.kept), batch[-1].module)
    return rows


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
