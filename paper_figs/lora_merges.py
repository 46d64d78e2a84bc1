"""Merges of LoRA adapters of a small transformer: accuracy, dependence on the gauge of the factors, and time.

Fréchet merging ("Generalizing the Geometry of Model Merging Through Fréchet Averages", arXiv 2604.27155) beside other
merges of this package and those of PEFT, on the task of examples/merge_lora.py: four adapters, each trained on one
shift of scikit-learn's digits, merged every way. The times are those of benchmarks/merge.json, if it is there.
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _common import main
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
TIMES = ROOT / "benchmarks" / "merge.json"
COLOURS = {"independent": "#0072B2", "shared": "#D55E00"}
OURS = ("tsvd", "bures", "tsvd, lifted", "bures, lifted")
NOTES = [
    "Accuracy: mean over the four shifts, at the output scale that is best on the other half of the test images; bars "
    "are standard errors over seeds. 'above tsvd' is the difference seed by seed.",
    "Gauge: the largest relative change of the merged update over seeds, when every adapter is written as "
    "(B G^-1, G A) with random G of condition number at most 10, in float32 files.",
    "independent and shared: whether the adapters of a seed start from different A or from the same one.",
    "'PEFT' is add_weighted_adapter of PEFT; the others are this package's, all on the update B A but for linear, "
    "which averages the factors. lifted: the rank may be the sum of the ranks.",
]


def tables(size: str, seed: int) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, Any]]:
    """The summary of the example by start of A, and its settings."""
    sys.path.insert(0, str(ROOT / "examples"))
    example = importlib.import_module("merge_lora")
    sizes = {"small": (1, 40, 10, 60, ("independent",)), "full": (3, 300, 150, 600, ("independent", "shared"))}
    chosen = example.Size(*sizes[size])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for init in chosen.inits:
            seeds = range(1000 * seed, 1000 * seed + chosen.seeds)
            runs = [example.run(chosen, s, init, example.METHODS, Path(folder) / f"{init}-{s}") for s in seeds]
            found[init] = example.summary(runs)
    return found, vars(chosen) | {"methods": [list(method) for method in example.METHODS]}


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """Accuracy, tuned and at scale 1; change under re-gauging; seconds for one layer."""
    found, settings = tables(size, seed)
    times = json.loads(TIMES.read_text())["one layer"] if TIMES.exists() else None
    first = next(iter(found.values()))
    names = sorted((n for n in first if not n.startswith("adapter ")), key=lambda n: first[n]["accuracy"])
    widths = [2, 2, 1] if times else [2, 2]
    figure, axes = plt.subplots(1, len(widths), figsize=(2.4 * sum(widths), 5.2), width_ratios=widths)
    axes[1].sharey(axes[0])
    axes[1].tick_params(labelleft=False)
    _accuracy(axes[0], found, names)
    _gauge(axes[1], found, names)
    if times:
        _times(axes[2], times)
    return figure, {"parameters": settings, "summary": found, "one_layer": times, "notes": NOTES}


def _places(names: list[str], k: int, count: int) -> list[float]:
    return [i + 0.36 * (k - (count - 1) / 2) for i in range(len(names))]


def _accuracy(ax: Axes, found: dict[str, Any], names: list[str]) -> None:
    for k, (init, table) in enumerate(found.items()):
        style: dict[str, Any] = {"color": COLOURS[init], "markersize": 4, "capsize": 2, "elinewidth": 0.8}
        means = [table[name]["accuracy"] for name in names]
        errors = [table[name]["accuracy standard error"] for name in names]
        ax.errorbar(means, _places(names, k, len(found)), xerr=errors, fmt="o", label=f"{init} A", **style)
        untuned = [table[name]["untuned"] for name in names]
        ax.plot(untuned, _places(names, k, len(found)), "o", color=COLOURS[init], markersize=4, markerfacecolor="none")
    ax.set_yticks(range(len(names)), names)
    for label in ax.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in OURS else "normal")
    ax.set(xlabel="accuracy, mean over the four shifts", title="filled: tuned scale, hollow: scale 1")
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.grid(axis="y", color="0.92")
    ax.figure.legend(loc="outside lower center", ncols=len(found))


def _gauge(ax: Axes, found: dict[str, Any], names: list[str]) -> None:
    for k, (init, table) in enumerate(found.items()):
        places = _places(names, k, len(found))
        points = [(table[name]["gauge"], place) for name, place in zip(names, places) if "gauge" in table[name]]
        x, y = zip(*points)
        ax.plot(np.maximum(x, 1e-9), y, "o", color=COLOURS[init], markersize=4)
    ax.set(xscale="log", xlabel="relative change of the merge", title="adapters in another gauge")
    ax.grid(color="0.92")


def _times(ax: Axes, times: dict[str, Any]) -> None:
    seconds = times["seconds (median)"]
    ax.barh(range(len(seconds)), list(seconds.values()), color="#555555")
    ax.set_yticks(range(len(seconds)), list(seconds))
    ax.set(xlabel="seconds", title=f"one {times['width']} x {times['width']} layer")


if __name__ == "__main__":
    main("lora_merges", draw, __doc__.splitlines()[0])
