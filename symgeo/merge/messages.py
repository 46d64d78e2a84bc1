"""What a merge and its worker processes say to each other: pickles on the standard streams of the worker.

The worker is given one :class:`Share`.  It answers with :data:`READY`, one :class:`Rows` for every batch, in order,
and at the end :class:`Finished`, or :class:`Failure` where it cannot go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symgeo.merge.peft.plan import MergePlan, ModulePlan

READY = b"symgeo.merge.worker is ready\n"  # what stands before it was printed by something that was imported


@dataclass(frozen=True)
class Share:
    """The batches that one process merges, on one device, into a file that its parent has made."""

    plan: MergePlan
    batches: list[list[ModulePlan]]
    file: Path
    device: str


@dataclass(frozen=True)
class Rows:
    """A batch is in the file; the rows of its report."""

    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Failure:
    """What the user is to be told, and where it happened."""

    message: str
    trace: str


@dataclass(frozen=True)
class Finished:
    """The share is in the file."""


Message = Rows | Failure | Finished
