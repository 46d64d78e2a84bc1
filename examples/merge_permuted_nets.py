"""
Merge networks that were trained apart
======================================

Two networks, averaged as they are, and modulo the symmetry of their hidden units. Two ReLU networks learn
scikit-learn's digits from different initial values. Their hidden units have no common order or scale, so that their
plain mean is a poor network. The symmetry is declared in a few lines; the second network is aligned with the first
one, and the Fréchet mean is taken on the quotient. Then the second network is replaced by another one of its orbit
(units permuted and rescaled, the same function), and everything is done again.

::

    python examples/merge_permuted_nets.py [--size small|full] [--out DIR]
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from _run import options, save
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import symgeo
from symgeo.data import Digits, digits
from symgeo.groups import Permutation, PositiveScaling
from symgeo.merge import align, barrier, merge_models

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]

# %%
# The symmetry
# ------------
# A hidden layer is a list of units h, each with one positive scale u; the next layer reads it with the dual.

SYMMETRY = symgeo.Symmetry(
    {
        "0.weight": "(h u) _", "0.bias": "(h u)",
        "2.weight": "(k v) (h u*)", "2.bias": "(k v)",
        "4.weight": "_ (k v*)", "4.bias": "_",
    },
    {"h": Permutation(), "u": PositiveScaling(per="h"), "k": Permutation(), "v": PositiveScaling(per="k")},
    {"u": 1, "v": 1},
)  # fmt: skip


def network(width: int) -> nn.Sequential:
    """64 pixels, two hidden layers, 10 classes, in float64."""
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers).double()


def trained(width: int, data: Digits, steps: int, seed: int) -> Params:
    """Parameters after AdamW from the initial values of a seed."""
    torch.manual_seed(seed)
    model, generator = network(width), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    images, labels = data.train_images.flatten(1).double(), data.train_labels
    for _ in range(steps):
        chosen = torch.randint(0, len(labels), (64,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


class Judge:
    """Loss and accuracy on the test images."""

    def __init__(self, width: int, data: Digits) -> None:
        self.model = network(width)
        self.batch: Batch = (data.test_images.flatten(1).double(), data.test_labels)
        self.training = [(data.train_images.flatten(1).double(), data.train_labels)]

    def logits(self, params: Mapping[str, Tensor]) -> Tensor:
        """Of all test images."""
        return torch.func.functional_call(self.model, dict(params), (self.batch[0],))

    def loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(torch.func.functional_call(self.model, dict(params), (batch[0],)), batch[1])

    def accuracy(self, params: Mapping[str, Tensor]) -> float:
        """On the test images."""
        return float((self.logits(params).argmax(-1) == self.batch[1]).double().mean())


# %%
# Alignment and means
# -------------------


def ways(judge: Judge, a: Params, b: Params) -> dict[str, Params]:
    """The second network as it is, and aligned with the first by its weights and by activations."""
    return {
        "as they are": b,
        "aligned by weights": align(SYMMETRY, b, a)[0],
        "aligned by activations": align(SYMMETRY, b, a, model=judge.model, batches=judge.training)[0],
    }


def merges(judge: Judge, a: Params, b: Params) -> dict[str, Params]:
    """Means of two networks."""
    return {
        "plain mean": merge_models([a, b], method="mean"),
        "Fréchet mean": merge_models([a, b], symmetry=SYMMETRY),
        "Fréchet mean, activations": merge_models([a, b], symmetry=SYMMETRY, model=judge.model, batches=judge.training),
    }


# %%
# Before and after the second network is moved along its orbit
# ------------------------------------------------------------


def run(width: int, steps: int, seed: int, points: int) -> dict[str, Any]:
    """One pair of networks: barriers, merges, and the same after the second one is moved along its orbit."""
    data = digits(600, seed)
    judge = Judge(width, data)
    a, b = (trained(width, data, steps, 10 * seed + k) for k in (0, 1))
    action = SYMMETRY.bind(b)
    moved = action.act(action.random(torch.Generator().manual_seed(seed)), b)
    first, second = merges(judge, a, b), merges(judge, a, moved)
    paths = {name: barrier(judge.loss, a, end, [judge.batch], points) for name, end in ways(judge, a, b).items()}
    scale = float(judge.logits(a).abs().max())
    return {
        "accuracy": {"network 1": judge.accuracy(a), "network 2": judge.accuracy(b)}
        | {name: judge.accuracy(params) for name, params in first.items()},
        "accuracy after moving network 2": {name: judge.accuracy(params) for name, params in second.items()},
        "change of the logits by moving network 2": {"network 2": _change(judge, b, moved) / scale}
        | {name: _change(judge, first[name], second[name]) / scale for name in first},
        "barrier": {name: path.height for name, path in paths.items()},
        "losses": {name: list(path.losses) for name, path in paths.items()},
        "times": list(next(iter(paths.values())).t),
    }


def _change(judge: Judge, a: Params, b: Params) -> float:
    return float((judge.logits(a) - judge.logits(b)).abs().max())


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, standard error and largest value over seeds, by quantity and name."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for quantity in [key for key in runs[0] if key not in ("losses", "times")]:
        for name in runs[0][quantity]:
            values = [run[quantity][name] for run in runs]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cell = {"mean": statistics.mean(values), "standard error": error, "largest": max(values)}
            table.setdefault(quantity, {})[name] = cell
    return table


def show(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """All numbers, by quantity."""
    for quantity, rows in table.items():
        print(f"\n{quantity}")
        for name, cell in rows.items():
            if quantity.startswith("change"):
                print(f"  {name:28}{cell['largest']:12.1e} at most, relative to the largest logit")
            else:
                print(f"  {name:28}{cell['mean']:10.4f} ± {cell['standard error']:.4f}")


def picture(runs: Sequence[dict[str, Any]]) -> Figure:
    """Test loss along the straight lines; thin lines are single pairs, thick ones means."""
    figure, axes = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    for color, name in zip(("C3", "C0", "C2"), runs[0]["losses"]):
        curves = torch.tensor([run["losses"][name] for run in runs])
        for curve in curves:
            axes.plot(runs[0]["times"], curve, color=color, linewidth=0.5, alpha=0.5)
        axes.plot(runs[0]["times"], curves.mean(0), color=color, linewidth=2, label=name)
    axes.set(xlabel="from network 1 to network 2", ylabel="test loss", title=f"{len(runs)} pairs trained apart")
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Trains, aligns, merges, prints and plots."""
    chosen = options(__doc__)
    width, steps, seeds, points = {"small": (32, 100, 2, 5), "full": (128, 500, 5, 21)}[chosen.size]
    runs = [run(width, steps, seed, points) for seed in range(seeds)]
    table = summary(runs)
    print(f"{seeds} pairs of networks with two hidden layers of {width} units: mean ± standard error")
    show(table)
    record = {"size": chosen.size, "width": width, "steps": steps, "summary": table, "pairs": runs}
    save(chosen.out, "merge_permuted_nets", record, picture(runs))


if __name__ == "__main__":
    main()
