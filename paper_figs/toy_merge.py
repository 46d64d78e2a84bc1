"""Averages of the net f(x) = theta1 theta2 x: of the parameters, weighted by Fisher, and on the quotient.

(a theta1, theta2 / a) is the same predictor p = theta1 theta2 for every a. The parameters of two such copies average
to another predictor, which depends on a and can vanish; so do averages weighted by the diagonal of the Fisher matrix.
A Fréchet mean on the quotient depends on the predictors alone. The geometry of model merging is that of
arXiv 2604.27155; the closed forms are derived here.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _closed_forms import Array
from _common import main
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from manifolds import FactorPair, frechet_mean
from symgeo.merge import merge_factors

POINTS = ((2.0, 3.0), (0.5, 4.0))  # predictors 6 and 2
SHOWN_GAUGES = (0.4, 1.0, 3.0)  # of the second point, in the plane
TABLE_GAUGES = (3.0, 10.0, -1.0)
MEANS = {"geodesic-mix": "arithmetic mean", "bures": "power mean 1/2", "geodesic-inv": "geometric mean"}
NOTES = [
    "Collapse: two copies (t1, t2), (t1 / g, g t2) of one predictor p average to p (1 + g)^2 / (4 g) (parameters) and "
    "p g (1 + g)^2 / (1 + g^2)^2 (diagonal Fisher), which is p only at g = 1, 0 at g = -1, and tends to infinity and "
    "to 0 for large g.",
    "The diagonal of the Fisher matrix [[t2^2, t1 t2], [t1 t2, t1^2]] (unit noise, E x^2 = 1) is the metric mix: what "
    "breaks the invariance is not the diagonal alone but the straight chord, measured at the inputs.",
    "Predictors of opposite sign lie in different components: there is no geodesic between them, and the merge says "
    "which other method took its place.",
]


def euclidean(points: Array) -> Array:
    """The mean of the parameters; points (..., N, 2)."""
    return points.mean(-2)


def fisher(points: Array) -> Array:
    """``(sum_i F_i)^-1 sum_i F_i theta_i`` with the diagonal ``F_i = (theta2^2, theta1^2)``; points (..., N, 2)."""
    weight = points[..., ::-1] ** 2
    return (weight * points).sum(-2) / weight.sum(-2)


def regauged(point: tuple[float, float], gauge: Array) -> Array:
    """``(theta1 / g, g theta2)``, shape (..., 2)."""
    return np.stack([point[0] / gauge, point[1] * gauge], -1)


def predictor(point: Array) -> Array:
    """``theta1 theta2``."""
    return point[..., 0] * point[..., 1]


def quotient(method: str, points: Array) -> tuple[float, dict[str, Any]]:
    """The predictor of the package's merge of nets (N, 2), and its report."""
    factors = [tuple(torch.from_numpy(np.array([[[t]] for t in point]))) for point in points]
    merged = merge_factors(factors, method=method)
    return float(merged.B @ merged.A), merged.report


def power_mean(values: Array, method: str) -> float:
    """Closed forms of the three quotient means: arithmetic (mix), power 1/2 (bures), geometric (inv)."""
    if method == "geodesic-mix":
        return float(values.mean())
    return float(np.sqrt(values).mean() ** 2) if method == "bures" else float(np.exp(np.log(values).mean()))


def on_manifold(metric: str, points: Array) -> float:
    """The predictor of the Fréchet mean by Karcher's iteration over ``FactorPair``, in the gauge that is given."""
    mean = frechet_mean(FactorPair(1, metric), torch.from_numpy(points.copy()).unsqueeze(-1))
    return float(mean.point.prod())


def means(seed: int, gauges: int) -> list[dict[str, Any]]:
    """Merges of the two predictors for random gauges of both: the largest difference from the closed forms."""
    rows = []
    copies = random_copies(seed, gauges)
    p = predictor(np.array(POINTS))
    for method, name in MEANS.items():
        expected = power_mean(p, method)
        values = [quotient(method, pair)[0] for pair in copies]
        row = {"method": method, "mean": name, "value": values[0], "closed_form": expected}
        row["difference"] = max(abs(value - expected) for value in values)
        if method != "bures":  # the same mean by other code, which brings no input to a canonical gauge first
            found = [on_manifold(method.removeprefix("geodesic-"), pair) for pair in copies]
            row["difference_on_manifold"] = max(abs(value - expected) for value in found)
        rows.append(row)
    return rows


def random_copies(seed: int, count: int) -> list[Array]:
    """The two points as they are, and in random gauges."""
    gauges = np.exp(np.random.default_rng(seed).normal(0, 1.5, (count, 2)))
    return [np.array(POINTS)] + [np.stack([regauged(q, g) for q, g in zip(POINTS, pair)]) for pair in gauges]


def collapse() -> list[dict[str, Any]]:
    """Averages of two copies of the predictor 6: what is found, and the closed forms of the notes."""
    rows = []
    for g in TABLE_GAUGES:
        copies = np.stack([POINTS[0], regauged(POINTS[0], np.array(g))])
        p = float(predictor(copies[0]))
        forms = {"euclidean": p * (1 + g) ** 2 / (4 * g), "fisher": p * g * (1 + g) ** 2 / (1 + g**2) ** 2}
        found = {"euclidean": float(predictor(euclidean(copies))), "fisher": float(predictor(fisher(copies)))}
        forms |= dict.fromkeys(MEANS, p)
        found |= {method: quotient(method, copies)[0] for method in MEANS}
        for name, form in forms.items():
            row = {"gauge": g, "method": name, "value": found[name], "closed_form": form}
            rows.append(row | {"difference": abs(found[name] - form)})
    return rows


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """The plane, and merged predictors against the gauge of one input; the seed draws the gauges of `means`."""
    count, random = {"small": (5, 2), "full": (101, 10)}[size]
    gauges = np.geomspace(0.05, 20, count)
    copies = np.stack([np.broadcast_to(POINTS[0], (count, 2)), regauged(POINTS[1], gauges)], -2)
    merged = {"euclidean": predictor(euclidean(copies)), "fisher": predictor(fisher(copies))}
    merged |= {method: np.array([quotient(method, pair)[0] for pair in copies]) for method in MEANS}
    figure, (plane, curves) = plt.subplots(1, 2, figsize=(8.6, 4.0))
    _plane(plane)
    for name, values in merged.items():
        curves.plot(gauges, values, "--" if name in MEANS else "-", label=name)
    curves.set(xscale="log", yscale="log", xlabel="gauge of the second net", ylabel="merged predictor", ylim=(0.3, 40))
    curves.set_title("predictors 6 and 2, merged")
    curves.legend()
    opposed = np.array([POINTS[0], (-POINTS[1][0], POINTS[1][1])])
    fallbacks = {method: quotient(method, opposed)[1] for method in MEANS if method != "bures"}
    return figure, {
        "parameters": {"points": [list(q) for q in POINTS], "gauges": count},
        "means": means(seed, random),
        "copies_of_one_predictor": collapse(),
        "range_over_gauges": {name: [float(v.min()), float(v.max())] for name, v in merged.items()},
        "opposite_signs": {method: report["fallback"] for method, report in fallbacks.items()},
        "notes": NOTES,
    }


def _plane(ax: Axes) -> None:
    """Level sets of the predictor, the inputs, their averages, and the orbits that are quotient means."""
    theta1, theta2 = np.meshgrid(np.linspace(0.05, 5.5, 200), np.linspace(0.05, 13, 200))
    levels = ax.contour(theta1, theta2, theta1 * theta2, levels=[1, 2, 3, 4, 6, 8, 20], colors="0.8", linewidths=0.6)
    ax.clabel(levels, fontsize=6)
    first = theta1[0]
    for k, point in enumerate(POINTS):
        ax.plot(first, predictor(np.array(point)) / first, color="0.2", linewidth=0.8)
        copies = regauged(point, np.array(SHOWN_GAUGES if k else (1.0,)))
        ax.plot(*copies.T, "ko", markersize=4)
    for color, method in zip(("C2", "C3", "C4"), MEANS):
        p = power_mean(predictor(np.array(POINTS)), method)
        ax.plot(first, p / first, "--", color=color, linewidth=1.2, label=f"{method}: p = {p:.3g}")
    pairs = np.stack([np.broadcast_to(POINTS[0], (3, 2)), regauged(POINTS[1], np.array(SHOWN_GAUGES))], -2)
    ax.plot(*euclidean(pairs).T, "x", color="C0", label="mean of parameters")
    ax.plot(*fisher(pairs).T, "+", color="C1", markersize=8, label="diagonal Fisher")
    ax.set(xlim=(0, 5.5), ylim=(0, 13), xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")
    ax.set_title("one net, three copies of another, and their averages")
    ax.legend(loc="upper right")


if __name__ == "__main__":
    main("toy_merge", draw, __doc__.splitlines()[0])
