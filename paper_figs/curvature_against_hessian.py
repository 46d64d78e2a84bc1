"""Curvature from one gradient against the true Hessian, along training, with the group as the knob.

For a small displacement ``w' - w`` every estimate H predicts a change of the gradient, ``H (w' - w)``; shown is the
cosine of the angle to the true change, for random directions and for that of the negative gradient. The estimates are
those of "Exploiting weight-space symmetries for approximating curvature" (arXiv 2606.00442) and "secant" (derived
here); networks, data and displacements are ours, so the numbers are not comparable with the paper's.
"""

import statistics
from collections.abc import Callable
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
    families,
    flat,
    group_average,
)
from matplotlib.figure import Figure
from torch import Tensor

from symgeo.curvature import Decomposition, estimate

Operator = Callable[[Params], Params]

SMALL_NET = 300  # parameters; up to here the dense Hessian and its group average are shown too
LENGTH = 1e-3  # of a displacement, relative to the weights
DIRECTIONS = ("random", "negative gradient")
REFERENCES = ("Hessian", "Shampoo", "identity")
STYLES = {
    "Hessian": ("0.0", "-"), "Hessian, group average": ("0.0", ":"), "Eq. 11, gradient": ("#0072B2", "-"),
    "Eq. 11, block-diagonal": ("#0072B2", "--"), "Eq. 10, riccati": ("#D55E00", "-"), "secant": ("#009E73", "-"),
    "Shampoo": ("#CC79A7", "-"), "identity": ("0.6", "-"),
}  # fmt: skip
NOTES = [
    "Mean over seeds (initial values and data); random: mean over directions too. Full-batch gradient descent.",
    "One gradient at w gives every estimate; no averages over time, no damping, trivial='diagonal'.",
    "Shampoo is H = (m n)^(-1/4) L^(1/4) x R^(1/4), tensor by tensor, from the same one gradient.",
    "Block-diagonal: the same group, with elements of its own for each tensor, which is a coarser model.",
    "For rotations tensor by tensor the two forms of Eq. 11 are one, and the group is no symmetry of the loss.",
]


def shampoo(grads: Params) -> Operator:
    """(m n)^(-1/4) L^(1/4) V R^(1/4) for each tensor, from L = G G^T, R = G^T G; vectors are columns."""

    def side(g: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(g @ g.T)
        return (vectors * values.clamp_min(0) ** 0.25) @ vectors.T

    matrices = {name: g.reshape(len(g), -1) for name, g in grads.items()}
    left = {name: side(g) / g.numel() ** 0.25 for name, g in matrices.items()}
    right = {name: side(g.T) for name, g in matrices.items()}

    def product(v: Params) -> Params:
        return {name: (left[name] @ x.reshape(len(x), -1) @ right[name]).reshape(x.shape) for name, x in v.items()}

    return product


def operators(problem: Problem, params: Params, every: int) -> dict[str, dict[str, Operator]]:
    """Estimates by group and name; those without a group stand in every group."""
    grads = problem.gradient(params)
    common: dict[str, Operator] = {
        "Hessian": lambda v: problem.hessian_product(params, v), "Shampoo": shampoo(grads), "identity": lambda v: v,
    }
    dense = dense_hessian(problem, params) if flat(params).numel() <= SMALL_NET else None
    found: dict[str, dict[str, Operator]] = {}
    for family, (joint, apart) in families(problem.widths, every).items():
        split = Decomposition(joint, params)
        here = {
            "Eq. 11, gradient": estimate(params, grads, split),
            "Eq. 11, block-diagonal": estimate(params, grads, apart),
            "Eq. 10, riccati": estimate(params, grads, split, "riccati"),
            "secant": estimate(params, grads, split, "secant"),
        }
        if dense is not None:
            here["Hessian, group average"] = group_average(split, dense, params)
        found[family] = {**common, **{name: operator.__matmul__ for name, operator in here.items()}}
    return found


def cosines(problem: Problem, params: Params, every: int, count: int, seed: int) -> dict[str, Any]:
    """Cosines by direction, group and estimate, at one point."""
    generator = torch.Generator().manual_seed(seed)
    grads = problem.gradient(params)
    size = LENGTH * float(flat(params).norm())
    towards = {
        "random": [direction(params, generator) for _ in range(count)],
        "negative gradient": [{name: -g / flat(grads).norm() for name, g in grads.items()}],
    }
    found = operators(problem, params, every)
    result: dict[str, Any] = {}
    for name, directions in towards.items():
        moved = [problem.gradient(combine(params, v, size)) for v in directions]
        changes = [combine(there, grads, -1.0) for there in moved]
        result[name] = {
            family: {row: statistics.fmean(cosine(h(v), dg) for v, dg in zip(directions, changes))
                     for row, h in here.items()}
            for family, here in found.items()
        }
    return result


def trained(widths: tuple[int, ...], every: int, stops: list[int], count: int, seed: int) -> list[dict[str, Any]]:
    """Cosines at every stop of one training."""
    generator = torch.Generator().manual_seed(seed)
    problem = Problem.draw(widths, 256, generator)
    points = problem.training(problem.initial(generator), 0.2, stops)
    return [{"step": step, "loss": float(problem.loss(p))} | cosines(problem, p, every, count, seed)
            for step, p in points]


def averaged(runs: list[list[dict[str, Any]]], key: str, family: str) -> dict[str, list[float]]:
    """Means over seeds, by estimate, along training."""
    rows = runs[0][0][key][family]
    return {row: [statistics.fmean(run[k][key][family][row] for run in runs) for k in range(len(runs[0]))]
            for row in rows}


def over_training(runs: list[list[dict[str, Any]]], key: str, family: str) -> dict[str, list[float]]:
    """Mean over seeds and stops, and the standard error over seeds, by estimate."""
    result = {}
    for row in runs[0][0][key][family]:
        means = [statistics.fmean(point[key][family][row] for point in run) for run in runs]
        error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
        result[row] = [statistics.fmean(means), error]
    return result


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """A column for each group, a row for each network and direction."""
    full = size == "full"
    nets = {(4, 16, 2): 1, (8, 24, 24, 24, 2): 2} if full else {(3, 6, 2): 1}
    stops = [0, 1, 3, 10, 30, 100, 300, 1000, 3000] if full else [0, 3, 10]
    seeds, count = (5, 16) if full else (1, 3)
    numbers: dict[str, Any] = {}
    figure, axes = plt.subplots(2 * len(nets), 3, figsize=(9.6, 2.3 * 2 * len(nets) + 0.8), sharex=True, sharey=True,
                                squeeze=False)
    for i, (widths, every) in enumerate(nets.items()):
        runs = [trained(widths, every, stops, count, 1000 * seed + k) for k in range(seeds)]
        title = "-".join(map(str, widths))
        losses = [statistics.fmean(run[k]["loss"] for run in runs) for k in range(len(stops))]
        numbers[title] = {"loss": losses, "cosines": {}, "mean_and_error_over_training": {}}
        for j, key in enumerate(DIRECTIONS):
            for ax, family in zip(axes[2 * i + j], families(widths, every)):
                curves = averaged(runs, key, family)
                numbers[title]["cosines"].setdefault(key, {})[family] = curves
                means = numbers[title]["mean_and_error_over_training"].setdefault(key, {})
                means[family] = over_training(runs, key, family)
                for row, values in curves.items():
                    color, line = STYLES[row]
                    ax.plot([s + 1 for s in stops], values, line, color=color, label=row, marker=".", markersize=3)
                ax.axhline(0, color="0.8", linewidth=0.6)
                ax.set(xscale="log", ylim=(-0.6, 1.05), title=f"{title}, {family}" if j == 0 else "")
            axes[2 * i + j][0].set_ylabel(f"cosine,\n{key}")
    for ax in axes[-1]:
        ax.set_xlabel("steps of gradient descent + 1")
    handles = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    settings = {"steps": stops, "seeds": seeds, "random_directions": count, "length": LENGTH}
    return figure, {"parameters": settings, "nets": numbers, "notes": NOTES}


if __name__ == "__main__":
    main("curvature_against_hessian", draw, __doc__.splitlines()[0])
