"""What a finer group buys: accuracy of curvature estimates against the numbers that they keep.

A subgroup of a symmetry is a symmetry, with more blocks and more numbers. On the hidden units of a tanh network act:
permutations of n / b clusters of b units for every divisor b of n (b = 1: all permutations, b = n: no group), cyclic
shifts, signs, signed permutations, and rotations (no symmetry of the loss), jointly and tensor by tensor. Shown are
the cosine to the true change of the gradient for random directions, the distance to the Hessian's group average, and
the error of the secant equation, for the three estimators, from one gradient and from moments averaged over steps of
training. Compare the trade-off named in arXiv 2606.00442; network and data are ours.
"""

import statistics
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any

import matplotlib.pyplot as plt
import torch
from _common import main
from _curvature import (
    Params,
    Problem,
    combine,
    cosine,
    dense_hessian,
    direction,
    flat,
    group_average,
    on_hidden,
)
from matplotlib.figure import Figure

from symgeo import Symmetry
from symgeo.curvature import Decomposition, InvariantOperator, Moments, hessian, orbit_average, orbit_mean
from symgeo.groups import Cyclic, Group, Orthogonal, Permutation, SignFlip

Sample = tuple[Params, Params]  # weights, gradient

ESTIMATORS = {"gradient": "Eq. 11, gradient", "riccati": "Eq. 10, riccati", "secant": "secant"}
COLORS = {"gradient": "#0072B2", "riccati": "#D55E00", "secant": "#009E73"}
MEASURES = {
    "cosine": "cosine, random directions",
    "distance": "distance to the group average\nof the Hessian, relative",
    "secant": "error of the secant equation,\nrelative",
}
LENGTH = 1e-3  # of a displacement, relative to the weights
ROWS = 32  # of a batch
NOTES = [
    "Mean over seeds and points of the training; no damping, trivial='uncentred'.",
    "One gradient: on all data. Averaged: the moments of weights and gradients of the steps before the point, on "
    "batches of 32, gradients as they are (no momentum).",
    "Distance |H' - A| / |A| (Frobenius), A the Hessian's group average, with the best scale for H': Eq. 11 leaves "
    "the scale open.",
    "Error |H' dw - dg| / |dg|, dw and dg the weights and the gradient without their orbit means, best scale again. "
    "With no group both vanish, and nothing is shown.",
    "The share of the Hessian that its group average keeps, |A|^2 / |H|^2, is in the JSON as 'kept'.",
    "Numbers kept: M^2 for each block, the trivial one among them.",
]


def choices(widths: tuple[int, ...]) -> dict[str, Symmetry]:
    """The groups by name."""
    n = widths[1]
    signed: dict[str, Group] = {"h": Permutation(), "s": SignFlip(per="h")}
    found = {
        "rotations, apart": on_hidden(widths, "h", {"h": Orthogonal()}, joint=False),
        "rotations": on_hidden(widths, "h", {"h": Orthogonal()}),
        "signed permutations": on_hidden(widths, "(h s)", signed, {"s": 1}),
        "permutations, apart": on_hidden(widths, "h", {"h": Permutation()}, joint=False),
        "cyclic shifts": on_hidden(widths, "h", {"h": Cyclic()}),
        "signs": on_hidden(widths, "h", {"h": SignFlip()}),
    }
    for b in (b for b in range(1, n + 1) if n % b == 0):
        name = "permutations" if b == 1 else "none" if b == n else f"{n // b} clusters of {b}"
        found[name] = on_hidden(widths, "(h f)", {"h": Permutation()}, {"h": n // b})
    return found


def numbers_kept(split: Decomposition) -> int:
    """Of all blocks; a complex number is two."""
    shapes = [(*bucket.shape[:3], bucket.complex) for bucket in split.buckets]
    return sum(k * b * m * m * (1 + complex_) for k, b, m, complex_ in shapes)


def estimates(split: Decomposition, samples: list[Sample]) -> dict[str, InvariantOperator]:
    """The three estimators, from moments averaged over samples."""

    def mean(operators: list[InvariantOperator]) -> InvariantOperator:
        return reduce(add, operators) * (1 / len(operators))

    gradient = mean([orbit_average(split, g) for _, g in samples])
    weight = mean([orbit_average(split, w) for w, _ in samples])
    mixed = mean([orbit_average(split, g, w) for w, g in samples])
    return {name: hessian(name, Moments(gradient, weight, mixed)) for name in ESTIMATORS}


def errors(problem: Problem, samples: list[Sample], symmetry: Symmetry, count: int, seed: int) -> dict[str, Any]:
    """The measures of every estimator at the last sample, and the share that the group average keeps."""
    generator = torch.Generator().manual_seed(seed)
    params = samples[-1][0]
    grads, dense = problem.gradient(params), dense_hessian(problem, params)
    split = Decomposition(symmetry, params)
    average = group_average(split, dense, params).dense()
    weights, forces = (combine(x, orbit_mean(split, x), -1.0) for x in (params, grads))
    size = LENGTH * float(flat(params).norm())
    directions = [direction(params, generator) for _ in range(count)]
    changes = [combine(problem.gradient(combine(params, v, size)), grads, -1.0) for v in directions]
    result: dict[str, Any] = {"kept": float((average.norm() / dense.norm()) ** 2)}
    for name, operator in estimates(split, samples).items():
        result[name] = {
            "cosine": statistics.fmean(cosine(operator @ v, dg) for v, dg in zip(directions, changes)),
            "distance": _residual(operator.dense().flatten(), average.flatten()),
            "secant": _residual(flat(operator @ weights), flat(forces)),
        }
    return result


def _residual(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """min over c >= 0 of |c x - y| / |y|; None for y = 0."""
    if not y.norm():
        return None
    angle = float(x @ y / (x.norm() * y.norm())) if x.norm() else 0.0
    return float((1 - min(1.0, max(0.0, angle)) ** 2) ** 0.5)


def visited(problem: Problem, initial: Params, stops: list[int], window: int, seed: int) -> list[list[Sample]]:
    """The last samples before every stop: weights along gradient descent, and gradients there.

    With a window of 1 gradients are those of all data, otherwise those of random batches.
    """
    generator = torch.Generator().manual_seed(seed)
    path = {step: point for step, point in problem.training(initial, 0.2, range(max(stops) + 1))}
    found = []
    for stop in stops:
        points = [path[step] for step in range(max(0, stop - window + 1), stop + 1)]
        found.append([
            (p, (problem if window == 1 else problem.batch(ROWS, generator)).gradient(p)) for p in points
        ])
    return found


def measured(widths: tuple[int, ...], stops: list[int], seeds: range, window: int, count: int) -> list[dict[str, Any]]:
    """A row for each group, by state: the means of the measures over seeds and points."""
    points = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        problem = Problem.draw(widths, 256, generator)
        points += [(problem, s, seed) for s in visited(problem, problem.initial(generator), stops, window, seed)]
    rows = []
    for name, symmetry in choices(widths).items():
        found = [errors(problem, samples, symmetry, count, seed) for problem, samples, seed in points]
        row: dict[str, Any] = {
            "group": name,
            "numbers": numbers_kept(Decomposition(symmetry, points[0][1][0][0])),
            "kept": statistics.fmean(f["kept"] for f in found),
        }
        for estimator in ESTIMATORS:
            row[estimator] = {m: _mean([f[estimator][m] for f in found]) for m in MEASURES}
        rows.append(row)
    return sorted(rows, key=lambda row: row["numbers"])


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """A row for each number of gradients, a panel for each measure; groups are ordered by the numbers they keep."""
    full = size == "full"
    widths = (4, 16, 2) if full else (3, 4, 2)
    stops = [100, 300, 1000] if full else [10]
    seeds = range(1000 * seed, 1000 * seed + (5 if full else 1))
    window, count = (100, 16) if full else (5, 3)
    found = {"one gradient": measured(widths, stops, seeds, 1, count),
             f"averaged over {window} steps": measured(widths, stops, seeds, window, count)}
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 7.0), sharex=True)
    for line, (title, rows) in zip(axes, found.items()):
        for ax, (measure, label) in zip(line, MEASURES.items()):
            for estimator, name in ESTIMATORS.items():
                values = [float("nan") if r[estimator][measure] is None else r[estimator][measure] for r in rows]
                style = {"color": COLORS[estimator], "markersize": 4, "linewidth": 0.7}
                ax.plot(range(len(rows)), values, "o-", label=name, **style)
            ax.set_title(f"{title}:\n{label}")
            ax.set_xticks(range(len(rows)), [f"{r['group']}: {r['numbers']}" for r in rows], rotation=90, fontsize=7)
    axes[0][0].legend()
    parameters = sum(a * b + b for a, b in pairwise(widths))
    settings = {"widths": list(widths), "steps": stops, "seeds": len(seeds), "length": LENGTH, "window": window,
                "parameters": parameters}
    return figure, {"parameters": settings, "groups": found, "notes": NOTES}


if __name__ == "__main__":
    main("accuracy_against_cost", draw, __doc__.splitlines()[0])
