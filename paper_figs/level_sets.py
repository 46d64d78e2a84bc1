"""Level sets of gradient norms and Hessian traces of the net f = theta1 theta2, Euclidean and Riemannian.

The symmetry (a theta1, theta2 / a) leaves f alone, so a quantity that belongs to f is constant on the
hyperbolas theta1 theta2 = const, drawn dashed; the red one is the minimum of the loss. Compare figures 1 and 8
of "Hide & Seek" (arXiv 2505.05409).
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _closed_forms import Array, scalar_net
from _common import main
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

TARGET = 1.0
ORBITS = (0.25, 0.5, 1.5, 2.0)
NOTES = [
    "inv Hessian trace = 8 p^2 - 4 p y with p = theta1 theta2: 4 y^2 at the minimum p = y of the loss, zero at "
    "p = y/2 and p = 0, least at p = y/4 with -y^2/2. The paper's statement that the trace reaches 0 at the "
    "minimum of the loss does not hold for this metric.",
    "mix Hessian trace is the trace over the horizontal direction, and constant (4): in this metric the loss "
    "is a quadratic function of p.",
    "Variation along an orbit is (max - min) over theta1 in [1/4, 4], relative to the largest absolute value "
    "on all orbits.",
]


def variation_along_orbits(name: str, points: int) -> dict[str, float]:
    """How much a quantity varies along each orbit theta1 theta2 = p; zero for one that ignores the symmetry."""
    theta1 = np.geomspace(0.25, 4.0, points)
    values = {p: scalar_net(theta1, p / theta1, TARGET)[name] for p in ORBITS}
    largest = max(float(np.abs(along).max()) for along in values.values())
    return {f"p={p:g}": float(np.ptp(along)) / largest for p, along in values.items()}


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """Six panels, and how much each quantity varies along four orbits; nothing here is random."""
    points = {"small": 60, "full": 400}[size]
    axis = np.linspace(0.05, 2.5, points)
    theta1, theta2 = np.meshgrid(axis, axis)
    quantities = scalar_net(theta1, theta2, TARGET)
    figure, axes = plt.subplots(2, 3, figsize=(8.4, 5.2), sharex=True, sharey=True)
    for ax, (name, values) in zip(axes.flat, quantities.items()):
        _panel(figure, ax, axis, values, name)
    variations = {name: variation_along_orbits(name, points) for name in quantities}
    p = np.linspace(0.0, 1.5, 100 * points)
    trace = scalar_net(p, np.ones_like(p), TARGET)["inv hessian trace"]
    return figure, {
        "parameters": {"target": TARGET, "orbits": list(ORBITS), "grid": points},
        "max_relative_variation_along_orbit": {n: max(v.values()) for n, v in variations.items()},
        "relative_variation_along_orbits": variations,
        "inv_hessian_trace": {
            "least": float(trace.min()),
            "least_at_p": float(p[trace.argmin()]),
            "at_the_minimum_of_the_loss": 8 * TARGET**2 - 4 * TARGET**2,
        },
        "notes": NOTES,
    }


def _panel(figure: Figure, ax: Axes, axis: Array, values: Array, name: str) -> None:
    if np.ptp(values) == 0:
        levels = values.flat[0] + np.array([-0.5, 0.5])
    else:
        levels = np.unique(np.quantile(values, np.linspace(0, 1, 15)))  # each band covers the same area
    filled = ax.contourf(axis, axis, values, levels=levels, norm=BoundaryNorm(levels, 256))
    figure.colorbar(filled, ax=ax, shrink=0.85, format="%.2g")
    for product in ORBITS:
        visible = axis[(product / axis) <= axis[-1]]
        ax.plot(visible, product / visible, "w--", linewidth=0.7)
    visible = axis[(TARGET / axis) <= axis[-1]]
    ax.plot(visible, TARGET / visible, "r-", linewidth=0.9)
    ax.set(title=name, xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")
    ax.label_outer()


if __name__ == "__main__":
    main("level_sets", draw, __doc__.splitlines()[0])
