"""Sharpness against generalization of diagonal linear nets u * v = beta trained on sparse regression.

Compare figure 3 of "Hide & Seek" (arXiv 2505.05409), which reports Kendall's tau of -0.68 (adaptive), -0.83
(geodesic, inv) and -0.86 (geodesic, mix) with the test loss. The nets differ in the scale of their initial values
and in the learning rate; all reach a train loss of 1e-6. Sharpness is maximised in beta space for the actual X,
which is exact for these nets (see the module of closed forms); the radius is swept, since the paper names none.
"""

from dataclasses import dataclass
from typing import Any

import _closed_forms
import matplotlib.pyplot as plt
import numpy as np
from _closed_forms import Array
from _common import main
from matplotlib.figure import Figure

from symgeo.sharpness.correlation import RankCorrelation, kendall

PAPER = {"adaptive": -0.68, "inv": -0.83, "mix": -0.86}
RHOS = (0.01, 0.1, 0.3, 1.0)
SHOWN = 0.3
TOLERANCE = 1e-6
NOTES = [
    "Sharpness is the largest rise of the train loss |X beta - y|^2 / n, maximised numerically in beta space with "
    "several starts, for the X of the regression and not for X^T X = 1.",
    "mix geodesics end where a coordinate of beta reaches zero, so the mix search stays in the orthant of beta. If "
    "signs could change, every interpolating net would have the same mix sharpness 2 rho^2 lambda_max(X^T X / n): "
    "the correlation of mix lives on that constraint and on what is left of the train loss.",
    "For small rho adaptive and inv agree to leading order, so their correlations do too.",
]


@dataclass(frozen=True)
class Problem:
    """Noiseless sparse regression y = X beta*, X (n, d) standard normal, ``nonzero`` entries of beta* of size 1."""

    x: Array
    y: Array
    target: Array


def problem(seed: int, n: int = 20, d: int = 30, nonzero: int = 3) -> Problem:
    generator = np.random.default_rng([seed, 0])
    x = generator.standard_normal((n, d))
    target = np.zeros(d)
    target[generator.choice(d, nonzero, replace=False)] = generator.choice([-1.0, 1.0], nonzero)
    return Problem(x, x @ target, target)


def train(task: Problem, count: int, seed: int, steps: int = 40_000) -> tuple[Array, Array, Array]:
    """Gradient descent of all nets at once; a net stops at the train loss 1e-6.

    Returns:
        betas of the nets that got there (k, d), their initial scales (k,) and learning rates (k,).
    """
    generator = np.random.default_rng([seed, 1])
    scales = np.exp(generator.uniform(np.log(0.02), np.log(1.0), count))
    rates = np.exp(generator.uniform(np.log(0.005), np.log(0.05), count))
    u = scales[:, None] * generator.standard_normal((count, task.x.shape[1]))
    v = scales[:, None] * generator.standard_normal((count, task.x.shape[1]))
    active = np.arange(count)
    for _ in range(steps):
        part_u, part_v = u[active], v[active]
        beta = part_u * part_v
        active = active[~(_closed_forms.loss(beta, task.x, task.y) <= TOLERANCE)]
        if not len(active):
            break
        part_u, part_v = u[active], v[active]
        slope = rates[active, None] * _closed_forms.gradient(part_u * part_v, task.x, task.y)
        u[active], v[active] = part_u - slope * part_v, part_v - slope * part_u
        active = active[np.abs(u[active] * v[active]).max(1) < 1e6]
    beta = u * v
    done = _closed_forms.loss(beta, task.x, task.y) <= TOLERANCE
    return beta[done], scales[done], rates[done]


def measure(beta: Array, task: Problem, rho: float) -> dict[str, float]:
    """The three sharpnesses of one net; the one place that knows how they are computed."""
    return {
        "adaptive": _closed_forms.adaptive(beta, task.x, task.y, rho),
        "inv": _closed_forms.inv(beta, task.x, task.y, rho),
        "mix": _closed_forms.mix(beta, task.x, task.y, rho),
    }


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    count = {"small": 8, "full": 50}[size]
    task = problem(seed)
    betas, scales, rates = train(task, count, seed)
    test = ((betas - task.target) ** 2).sum(-1)  # the test loss of standard normal inputs
    values = {rho: [measure(beta, task, rho) for beta in betas] for rho in RHOS}
    sharpness = {rho: {m: np.array([row[m] for row in rows]) for m in PAPER} for rho, rows in values.items()}
    taus = {rho: {m: kendall(s, test, seed=seed) for m, s in row.items()} for rho, row in sharpness.items()}
    return _figure(test, sharpness[SHOWN], taus), {
        "parameters": {"nets": count, "trained": len(betas), "tolerance": TOLERANCE, "rhos": list(RHOS)},
        "paper_tau": PAPER,
        "tau": {str(rho): {m: vars(tau) for m, tau in row.items()} for rho, row in taus.items()},
        "nets": {
            "init_scale": scales.tolist(),
            "lr": rates.tolist(),
            "train_loss": _closed_forms.loss(betas, task.x, task.y).tolist(),
            "test_loss": test.tolist(),
            "sharpness": {str(r): {m: s.tolist() for m, s in row.items()} for r, row in sharpness.items()},
        },
        "notes": NOTES,
    }


def _figure(
    test: Array, shown: dict[str, Array], taus: dict[float, dict[str, RankCorrelation]]
) -> Figure:
    figure, axes = plt.subplots(1, 4, figsize=(11.5, 2.9))
    for ax, (name, values) in zip(axes, shown.items()):
        ax.scatter(values, test, s=12)
        ax.set(xscale="log", yscale="log", xlabel=f"{name} sharpness, rho = {SHOWN}", ylabel="test loss")
        ax.set_title(f"{taus[SHOWN][name]}\npaper: tau = {PAPER[name]:+.2f}")
    for offset, name in enumerate(PAPER):
        row = [taus[rho][name] for rho in RHOS]
        middle = np.array([tau.tau for tau in row])
        # a bootstrap interval need not contain the estimate
        below = np.maximum(middle - [tau.low for tau in row], 0)
        above = np.maximum([tau.high for tau in row] - middle, 0)
        shifted = np.array(RHOS) * 1.12 ** (offset - 1)
        axes[3].errorbar(shifted, middle, [below, above], fmt="o-", markersize=3, capsize=2, label=name)
    axes[3].axhline(0, color="0.7", linewidth=0.8)
    axes[3].set(xscale="log", xlabel="rho", ylabel="Kendall's tau", ylim=(-1.05, 1.05))
    axes[3].legend()
    return figure


if __name__ == "__main__":
    main("diagonal_nets", draw, __doc__.splitlines()[0])
