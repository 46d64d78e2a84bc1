"""The file of all runs: what was done is kept, so that methods and seeds can be added later."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _protocol import Key, Method, Setting

from symgeo.data import Text


class Records:
    """Runs by what decides them, and the timing, with the circumstances under which they may be compared.

    Reads ``path`` if it is there.  Raises ``ValueError`` where it was made in another setting, on another text, or
    with a method of the same name that was fixed otherwise.
    """

    def __init__(self, path: Path, setting: Setting, text: Text, methods: Mapping[str, Method]) -> None:
        self.path = path
        self.header = {
            "setting": json.loads(json.dumps(asdict(setting))),  # tuples become lists, as in the file
            "text": {"digest": text.digest(), "train": len(text.train), "validation": len(text.validation)},
        }
        self.notes = {name: method.note for name, method in methods.items()}
        self.runs: dict[Key, list[float]] = {}
        self.timing: dict[str, Any] = {}
        if path.exists():
            self._read(json.loads(path.read_text()))

    def _read(self, stored: dict[str, Any]) -> None:
        for name, value in self.header.items():
            if stored[name] != value:
                raise ValueError(
                    f"{self.path}: needed runs with {name} {value}, found {stored[name]}; give another file")
        for name, note in stored["notes"].items():
            if self.notes.setdefault(name, note) != note:
                raise ValueError(
                    f"{self.path}: needed {name} as \"{self.notes[name]}\", found runs with \"{note}\"; drop them with "
                    f"--forget {name}"
                )
        for run in stored["runs"]:
            losses = [math.inf if value is None else value for value in run["losses"]]
            self.runs[Key(run["method"], run["lr"], run["seed"])] = losses
        self.timing = stored.get("timing", {})

    def write(self, summary: Mapping[str, Any]) -> None:
        """Replace the file as a whole; what is infinite becomes null.  One line per run."""
        done = {key.method for key in self.runs}
        head = {
            **self.header,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "notes": {name: note for name, note in self.notes.items() if name in done},
            "summary": _finite(summary),
            "timing": self.timing,
        }
        order = sorted(self.runs, key=lambda key: (key.method, key.lr, key.seed))
        lines = [json.dumps(asdict(key) | {"losses": _finite(list(self.runs[key]))}) for key in order]
        rows = ",\n    ".join(lines)
        text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "runs": [\n    {rows}\n  ]\n}}\n'
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(text)
        os.replace(part, self.path)


def forget(path: Path, names: list[str]) -> None:
    """Drop the runs of these methods from the file."""
    stored = json.loads(path.read_text())
    stored["runs"] = [run for run in stored["runs"] if run["method"] not in names]
    stored["notes"] = {name: note for name, note in stored["notes"].items() if name not in names}
    path.write_text(json.dumps(stored, indent=2) + "\n")


def _finite(value: Any) -> Any:
    """The same with None for every number that is not finite, and floats to six digits."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
