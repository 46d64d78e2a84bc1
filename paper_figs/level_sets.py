"""Level sets of gradient norms and Hessian traces of the net f = theta1 theta2, Euclidean and Riemannian.

The symmetry (a theta1, theta2 / a) leaves f alone, so a quantity that means something is constant on the
hyperbolas theta1 theta2 = const, drawn dashed. Compare figures 1 and 8 of "Hide & Seek" (arXiv 2505.05409).
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _closed_forms import Array, scalar_net
from _common import main
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TARGET = 1.0
ORBITS = (0.25, 0.5, 1.5, 2.0)
NOTES = [
    "inv Hessian trace = 8 p^2 - 4 p y with p = theta1 theta2: 4 y^2 at the minimum p = y of the loss, zero at "
    "p = y/2 (and p = 0), least at p = y/4 with -y^2/2. The paper's statement that the trace reaches 0 at the "
    "minimum does not hold for this metric.",
    "mix Hessian trace is the trace over the horizontal direction, and constant (4): in this metric the loss is "
    "a quadratic function of p.",
]


def variation_along_orbit(name: str, product: float, points: int) -> float:
    """(max - min) / max |value| over the orbit theta1 theta2 = product, theta1 from 1/4 to 4."""
    theta1 = np.geomspace(0.25, 4.0, points)
    values = scalar_net(theta1, product / theta1, TARGET)[name]
    return float((values.max() - values.min()) / np.abs(values).max())


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """Six panels, and how much each quantity varies along four orbits; nothing here is random."""
    points = {"small": 60, "full": 400}[size]
    axis = np.linspace(0.05, 2.5, points)
    theta1, theta2 = np.meshgrid(axis, axis)
    quantities = scalar_net(theta1, theta2, TARGET)
    figure, axes = plt.subplots(2, 3, figsize=(8.4, 5.2), sharex=True, sharey=True)
    for ax, (name, values) in zip(axes.flat, quantities.items()):
        _panel(figure, ax, axis, values, name)
    variations = {
        name: {f"p={product:g}": variation_along_orbit(name, product, points) for product in ORBITS}
        for name in quantities
    }
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
        filled = ax.contourf(axis, axis, values, levels=values.flat[0] + np.array([-1.0, 0.0, 1.0]))
    else:
        filled = ax.contourf(axis, axis, values, levels=14)
    figure.colorbar(filled, ax=ax, shrink=0.85)
    for product in ORBITS:
        visible = axis[(product / axis) <= axis[-1]]
        ax.plot(visible, product / visible, "w--", linewidth=0.7)
    visible = axis[(TARGET / axis) <= axis[-1]]
    ax.plot(visible, TARGET / visible, "r-", linewidth=0.9)
    ax.set(title=name, xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")
    ax.label_outer()


if __name__ == "__main__":
    main("level_sets", draw, __doc__.splitlines()[0])
