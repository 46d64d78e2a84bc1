"""
Merge LoRA adapters
===================

Four LoRA adapters of one small transformer, merged every way, and scored on images that tuned nothing. A vision
transformer learns scikit-learn's digits. Four LoRA adapters then learn one mild shift each (turned, enlarged, blurred,
noisy digits) and are saved as PEFT folders in OUT. Every method merges the folders; so do PEFT's own ``linear``,
``ties`` and ``svd``. For each merge the output scale is tuned on one half of the test images, over the same grid for
all, and the accuracy is counted on the other half, as the mean over the four shifts. Beside it stands the relative
change of the merged delta when every adapter is written in another gauge, (B G^-1, G A) with random G: the adapters
are the same functions, so a merge of functions must not move. (In float32 files that is 1e-7 or so.)

::

    python examples/merge_lora.py [--size small|medium|full] [--out DIR]
        [--init independent|shared|both] [--seeds N]

"shared" starts all adapters of a model at the same A, "independent" at different ones. "lifted" is ``rank="sum"``: the
merge may have the sum of the adapters' ranks, as ``cat`` does. ``--geodesics`` adds the two geodesic means; adapters
trained apart are mostly too far from each other for them, and ``tsvd`` takes their place, which the table says.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import matplotlib.pyplot as plt
import torch
from _adapters import Deltas, change, deltas, fine_tune, loaded, regauged
from _digit_domains import DOMAINS, pretrained
from _run import options, save
from matplotlib.figure import Figure
from peft import PeftModel
from torch import Tensor, nn

from symgeo.data import digits
from symgeo.merge import merge_adapters

SCALES = (0.1, 0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)  # 4 turns the mean of four adapters into their sum
METHODS = [(method, "max") for method in ("tsvd", "bures", "knots", "tsv", "iso", "ties", "dare", "core", "linear")]
METHODS += [("tsvd", "sum"), ("bures", "sum"), ("cat", "sum")]
GEODESICS = [("geodesic-mix", "max"), ("geodesic-inv", "max")]
PEERS = ("linear", "ties", "svd")


@dataclass(frozen=True)
class Size:
    """How much is trained, and on how many seeds."""

    seeds: int
    steps: int
    adapter_steps: int
    test: int  # images, halved into those for tuning and those for scoring
    inits: tuple[str, ...]


SIZES = {
    "small": Size(2, 100, 30, 200, ("independent",)),
    "medium": Size(2, 300, 150, 600, ("independent",)),
    "full": Size(5, 400, 200, 1197, ("independent", "shared")),
}

# %%
# All merges
# ----------
# Folders go in, and a folder comes out that PEFT reads.


def merged(
    base: nn.Module, folders: Sequence[Path], methods: Sequence[tuple[str, str]], out: Path
) -> tuple[dict[str, Deltas], dict[str, str]]:
    """Every merge of the folders, and why some of them used another method."""
    results, fallbacks = {}, {}
    for method, rank in methods:
        name = f"{method}, lifted" if rank == "sum" and method != "cat" else method
        target = out / f"{method}-{rank}"
        report = merge_adapters(folders, target, method=method, rank=rank, overwrite=True)
        results[name] = loaded(base, target)
        reasons = [row["fallback"]["reason"] for row in report.modules if row["fallback"]]
        if reasons:
            fallbacks[name] = f"{len(reasons)} of {len(report.modules)} modules: {reasons[0]}"
    names = [folder.name for folder in folders]
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folders[0]), adapter_name=names[0])
    for folder in folders[1:]:
        model.load_adapter(str(folder), adapter_name=folder.name)
    for peer in PEERS:
        model.add_weighted_adapter(names, [1 / len(names)] * len(names), peer, peer, density=0.2)
        results[f"PEFT {peer}"] = deltas(model, peer)
    return results, fallbacks


@torch.no_grad()
def accuracy(base: nn.Module, delta: Mapping[str, Tensor], scale: float, images: Tensor, labels: Tensor) -> float:
    """Accuracy of the model with weights ``W + scale delta``."""
    params = {name: p + scale * delta[name] if name in delta else p for name, p in base.named_parameters()}
    guesses = torch.func.functional_call(base, params, (images,)).argmax(-1)
    return float((guesses == labels).double().mean())


# %%
# Scores
# ------
# A scale is chosen on one half of the test images and the accuracy counted on the other.


class Scorer:
    """Test images in all four shifts, half to tune the scale on and half to score on."""

    def __init__(self, base: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.base = base
        self.halves = [({n: shift(images[k::2]) for n, shift in DOMAINS.items()}, labels[k::2]) for k in (0, 1)]

    def everywhere(self, delta: Mapping[str, Tensor], scale: float, half: int) -> float:
        """Mean accuracy over the shifts."""
        views, labels = self.halves[half]
        return accuracy(self.base, delta, scale, torch.cat(list(views.values())), labels.repeat(len(views)))

    def own(self, delta: Mapping[str, Tensor], shift: str) -> float:
        """Accuracy on one shift, at scale 1, on the scoring half."""
        views, labels = self.halves[1]
        return accuracy(self.base, delta, 1.0, views[shift], labels)

    def __call__(self, delta: Mapping[str, Tensor]) -> dict[str, Any]:
        """Accuracy at the best scale of the tuning half, and at scale 1, both on the scoring half."""
        scale = max(SCALES, key=lambda scale: self.everywhere(delta, scale, 0)) if delta else 1.0
        return {"accuracy": self.everywhere(delta, scale, 1), "untuned": self.everywhere(delta, 1.0, 1), "scale": scale}


def run(
    size: Size, seed: int, init: str, methods: Sequence[tuple[str, str]], out: Path
) -> dict[str, dict[str, Any]]:
    """One base, its adapters, all merges: accuracy of each, and its change when the adapters are re-gauged."""
    data = digits(600, seed)
    base = pretrained(data, size.steps, seed)
    folders = fine_tune(base, data, out, size.adapter_steps, seed, init == "shared")
    results, fallbacks = merged(base, folders, methods, out)
    with tempfile.TemporaryDirectory() as temporary:
        generator = torch.Generator().manual_seed(seed)
        copies = [regauged(folder, Path(temporary), generator) for folder in folders]
        moved, _ = merged(base, copies, methods, Path(temporary))
    score = Scorer(base, data.test_images[: size.test], data.test_labels[: size.test])
    experts = {folder.name: loaded(base, folder) for folder in folders}
    own = statistics.mean(score.own(delta, name) for name, delta in experts.items())
    rows: dict[str, dict[str, Any]] = {
        "base": score({}),
        "each adapter on its own": {"accuracy": own, "untuned": own, "scale": 1.0},
    }
    rows |= {f"adapter {name}": score(delta) for name, delta in experts.items()}
    for name, delta in results.items():
        rows[name] = score(delta) | {"gauge": change(delta, moved[name]), "fallback": fallbacks.get(name)}
    return rows


# %%
# Over seeds
# ----------


def summary(runs: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means and standard errors over seeds, of the accuracies and of what they are above tsvd's seed by seed.

    The seeds' bases differ by more than the methods do, which the difference to tsvd takes out.
    """
    table: dict[str, dict[str, Any]] = {}
    for name in runs[0]:
        rows = [run[name] for run in runs]
        columns = {key: [row[key] for row in rows] for key in ("accuracy", "untuned")}
        columns["above tsvd"] = [row["accuracy"] - run["tsvd"]["accuracy"] for row, run in zip(rows, runs)]
        line: dict[str, Any] = {"scales": [row["scale"] for row in rows]}
        for key, values in columns.items():
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            line |= {key: statistics.mean(values), f"{key} standard error": error}
        if "gauge" in rows[0]:
            line["gauge"] = max(row["gauge"] for row in rows)
            line["fallbacks"] = [row["fallback"] for row in rows if row["fallback"]]
        table[name] = line
    return table


def show(table: Mapping[str, dict[str, Any]]) -> None:
    """The table, best first."""
    print(f"{'':24}{'accuracy':>16}{'above tsvd':>18}{'at scale 1':>16}{'scale':>7}{'re-gauged':>11}")
    for name, line in sorted(table.items(), key=lambda item: -item[1]["accuracy"]):
        cells = {key: f"{line[key]:.4f} ± {line[f'{key} standard error']:.4f}" for key in ("accuracy", "untuned")}
        above = f"{line['above tsvd']:+.4f} ± {line['above tsvd standard error']:.4f}"
        scale, gauge = statistics.median(line["scales"]), f"{line['gauge']:11.1e}" if "gauge" in line else ""
        print(f"{name:24}{cells['accuracy']:>16}{above:>18}{cells['untuned']:>16}{scale:7.2f}{gauge}")
        if line.get("fallbacks"):
            print(f"{'':24}{len(line['fallbacks'])} seeds fell back: {line['fallbacks'][0]}")


def picture(tables: Mapping[str, Mapping[str, dict[str, Any]]]) -> Figure:
    """Accuracy with standard errors, and the change under re-gauging."""
    first = next(iter(tables.values()))
    names = sorted(first, key=lambda name: first[name]["accuracy"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 6), sharey=True, layout="constrained")
    for k, (init, table) in enumerate(tables.items()):
        place = [i + (k - (len(tables) - 1) / 2) * 0.3 for i in range(len(names))]
        errors = [table[name]["accuracy standard error"] for name in names]
        values = [table[name]["accuracy"] for name in names]
        left.errorbar(values, place, xerr=errors, fmt="o", markersize=4, linewidth=1, label=f"{init} A")
        gauge = [max(table[name].get("gauge", 0.0), 1e-17) for name in names]
        right.plot(gauge, place, "o", markersize=4, label=f"{init} A")
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="mean accuracy over the four shifts")
    left.grid(alpha=0.3)
    right.set(xscale="log", xlim=(1e-9, 1e3), xlabel="change of the merge by re-gauging, relative")
    right.grid(alpha=0.3)
    left.legend(frameon=False)
    return figure


def main() -> None:
    """Trains, merges, scores, prints and plots."""
    chosen = options(
        __doc__,
        tuple(SIZES),
        init={"choices": ("independent", "shared", "both"), "help": "start of the adapters' A"},
        seeds={"type": int, "help": "number of repetitions"},
        geodesics={"action": "store_true", "help": "also the geodesic means, which take long to give up"},
    )
    size = SIZES[chosen.size]
    inits = {"both": ("independent", "shared"), None: size.inits}.get(chosen.init, (chosen.init,))
    methods = METHODS + GEODESICS * chosen.geodesics
    tables, records = {}, {}
    for init in inits:
        runs = [
            run(size, seed, init, methods, chosen.out / "merge_lora" / f"{init}-{seed}")
            for seed in range(chosen.seeds or size.seeds)
        ]
        tables[init], records[init] = summary(runs), runs
        print(f"\nadapters with {init} A, {len(runs)} seeds: mean ± standard error")
        show(tables[init])
    record = {"size": chosen.size, "scales": SCALES, "summary": tables, "seeds": records}
    save(chosen.out, "merge_lora", record, picture(tables))


if __name__ == "__main__":
    main()
