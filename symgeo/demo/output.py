"""The demo's folder: it appears whole or not at all, and replaces nothing that the demo did not write."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILES = ("report.html", "report.json", "tau.png", "scatter.png", "orbit.png")


@contextmanager
def folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its place if the block succeeds.

    Raises ``ValueError`` before the block (and after it) where ``out`` is something other than nothing, an
    empty folder, or a report of the demo.
    """
    out = Path(out)
    check(out)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"--out {out}: it cannot be made ({reason}); choose another folder") from error
    with temporary as name:
        new, old = Path(name) / "new", Path(name) / "old"
        new.mkdir()  # with the permissions of an ordinary folder, which temporary ones do not have
        yield new
        check(out)
        if out.exists():
            os.rename(out, old)
        os.rename(new, out)
        shutil.rmtree(old, ignore_errors=True)


def check(out: Path) -> None:
    """``ValueError`` where a report may not take the place of ``out``."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"--out {out}: it is no folder; choose another name")
    if not out.exists() or not any(out.iterdir()):
        return
    strange = sorted(entry.name for entry in out.iterdir() if entry.name not in FILES)
    if strange or not _is_report(out / "report.json"):
        held = f"holds {strange[0]}" if strange else "is not empty"
        raise ValueError(f"--out {out}: it {held} and is no report of this demo; choose another folder, or empty it")


def _is_report(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("tool") == "symgeo" and found.get("command") == "demo"
