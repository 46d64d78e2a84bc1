"""What all examples share: their arguments, and where results go."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

SIZES = ("small", "full")
VARIABLE = "SYMGEO_EXAMPLE_SIZE"  # the size without --size


def options(description: str | None, sizes: Sequence[str] = SIZES, **more: dict[str, Any]) -> argparse.Namespace:
    """``--size`` and ``--out``, and more arguments by name; one thread, and the folder is made."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = os.environ.get(VARIABLE, "full")
    if size not in sizes:
        parser.error(f"{VARIABLE} must be one of {', '.join(sizes)}; found {size!r}")
    parser.add_argument("--size", choices=sizes, default=size, help=f"default: {VARIABLE}, or full")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the results")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    return chosen


def save(folder: Path, name: str, record: Any, figure: Figure | None = None) -> None:
    """``NAME.json``, and ``NAME.png`` of a figure."""
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    if figure is not None:
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)
