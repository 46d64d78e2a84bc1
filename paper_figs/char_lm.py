"""Optimizers on a small language model: validation loss along training, and what the learning rate does to it.

The full size draws benchmarks/optimizers.json, where all methods are tuned and run alike (see benchmarks/_protocol.py);
without that file, and in the small size, every method runs once on a tiny model. The optimizer of arXiv 2606.00442 is
`symgeo.optim.SymO`; task and numbers are ours.
"""

import importlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from _common import main
from matplotlib.figure import Figure

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RECORD = BENCHMARKS / "optimizers.json"
NOTES = [
    "Curves: mean over seeds at the learning rate that is best for seed 0; bands are standard errors of the mean.",
    "Learning rates: final loss with seed 0. All methods begin with five rates, a factor of two apart.",
    "Cost: steps times what a step costs with its forward and backward pass, in steps of AdamW; only where it was "
    "measured. AdamW steps what a method does not take, at one rate for all methods.",
]

NAMES = {
    "adamw": "AdamW", "muon": "torch Muon", "soap": "SOAP", "kl_shampoo": "KL-Shampoo",
    "shampoo_half": "Shampoo, exponent 1/2", "shampoo_tuned": "grafted Shampoo",
    "shampoo_quarter": "Shampoo, exponent 1/4", "symo_muon": "SymO, muon, betas .95, 0",
    "symo_one_sided": "SymO, muon, betas .9, .99, Adam graft",
    "symo_shampoo": "SymO, shampoo, power 1, Adam graft", "symo_soap": "SymO, SOAP", "symo_kl_soap": "SymO, KL-SOAP",
}  # those of the tables


def recorded() -> dict[str, Any]:
    """The benchmark's file."""
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def tiny(seed: int) -> dict[str, Any]:
    """The same facts from one run of every method of the benchmark, at the middle of its grid."""
    sys.path.insert(0, str(BENCHMARKS))
    protocol, methods = (importlib.import_module(name) for name in ("_protocol", "_methods"))
    text = importlib.import_module("symgeo.data").python_source()
    setting = protocol.SIZES["small"]
    runs = []
    for name, method in methods.METHODS.items():
        lr = method.grid[len(method.grid) // 2]
        losses = protocol.train(method, lr, seed, setting, text)
        runs.append({"method": name, "lr": lr, "seed": seed, "losses": losses})
    steps = {"evaluate_every": setting.evaluate_every, "steps": setting.steps}
    notes = {name: method.note for name, method in methods.METHODS.items()}
    return {"setting": steps, "notes": notes, "timing": {}, "runs": runs}


def curves(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By method, the best first: its rate, the mean losses over seeds and their errors, and the tuning of seed 0."""
    found = {}
    for name in record["notes"]:
        runs = [run for run in record["runs"] if run["method"] == name and None not in run["losses"]]
        if not runs:
            continue
        first = min(run["seed"] for run in runs)
        tuning = {run["lr"]: run["losses"][-1] for run in runs if run["seed"] == first}
        lr = min(tuning, key=tuning.__getitem__)
        columns = list(zip(*(run["losses"] for run in runs if run["lr"] == lr)))
        seeds = len(columns[0])
        errors = [statistics.stdev(c) / seeds**0.5 if seeds > 1 else 0.0 for c in columns]
        found[name] = {"lr": lr, "seeds": seeds, "losses": [statistics.fmean(c) for c in columns], "errors": errors,
                       "tuning": dict(sorted(tuning.items()))}
    return dict(sorted(found.items(), key=lambda item: item[1]["losses"][-1]))


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """Loss against steps, learning rate and, where it was measured, cost; the seed is that of the small size."""
    full = size == "full" and RECORD.exists()
    record = recorded() if full else tiny(seed)
    rows, every, timing = curves(record), record["setting"]["evaluate_every"], record["timing"]
    figure, axes = plt.subplots(1, 3 if timing else 2, figsize=(11.4 if timing else 8.2, 4.6), sharey=True)
    for k, (name, row) in enumerate(rows.items()):
        steps = [every * (i + 1) for i in range(len(row["losses"]))]
        style: dict[str, Any] = {"color": f"C{k % 8}", "linestyle": ("-", "--", ":")[k // 8 % 3]}
        low, high = ([a + sign * b for a, b in zip(row["losses"], row["errors"])] for sign in (-1, 1))
        axes[0].plot(steps, row["losses"], label=NAMES.get(name, name), **style)
        axes[0].fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
        axes[1].plot(list(row["tuning"]), list(row["tuning"].values()), "o", markersize=3, **style)
        cost = timing.get("step / step of AdamW", {}).get(name)
        if cost is not None:
            passes = timing["forward and backward / step of AdamW"]
            row["cost"] = (cost + passes) / (1 + passes)
            axes[2].plot([row["cost"] * step for step in steps], row["losses"], **style)
    axes[0].set(xlabel="steps", ylabel="validation loss, nats per character")
    axes[1].set(xlabel="learning rate (final loss)", xscale="log")
    if timing:
        axes[2].set(xlabel="cost, in steps with AdamW", xscale="log")
    if full:
        final = [row["losses"][-1] for row in rows.values()]
        axes[0].set_ylim(min(final) - 0.05, max(final) + 0.8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    source = "benchmarks/optimizers.json" if full else "one run of the small size"
    return figure, {"source": source, "setting": record["setting"], "methods": record["notes"],
                    "names": NAMES,
                    "curves": rows, "notes": NOTES}


if __name__ == "__main__":
    main("char_lm", draw, __doc__.splitlines()[0])
