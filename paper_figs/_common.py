"""What the figures share: arguments, style, and writing NAME.png and NAME.pdf beside NAME.json."""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import scipy
import torch
from matplotlib.figure import Figure

Draw = Callable[[str, int], tuple[Figure, dict[str, Any]]]

STYLE = Path(__file__).parent / "symgeo.mplstyle"


def main(name: str, draw: Draw, description: str, arguments: Sequence[str] | None = None) -> Path:
    """Parse the command line, draw, write the picture in both formats and its numbers; returns the PNG's path.

    ``draw(size, seed)`` returns the figure and the numbers it shows; "small" has to take seconds.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", choices=("small", "full"), default="full", help="small takes seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="results folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with plt.style.context(STYLE):
        figure, numbers = draw(options.size, options.seed)
        options.out.mkdir(parents=True, exist_ok=True)
        picture: Path = options.out / f"{name}.png"
        figure.savefig(picture)
        figure.savefig(picture.with_suffix(".pdf"), metadata={"CreationDate": None})
        plt.close(figure)
    settings = {"figure": name, "size": options.size, "seed": options.seed, "versions": versions()}
    record = settings | {"cpu_seconds": round(time.process_time(), 1)} | numbers
    picture.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(*(picture.with_suffix(suffix) for suffix in (".png", ".pdf", ".json")), sep="\n")
    return picture


def versions() -> dict[str, str]:
    """Versions of everything that a number could depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "matplotlib": matplotlib.__version__,
    }
