"""Sharpness against generalization of diagonal linear nets u * v = beta trained on sparse regression.

Compare figure 3 of "Hide & Seek" (arXiv 2505.05409), which reports Kendall's tau of -0.68 (adaptive), -0.83
(geodesic, inv) and -0.86 (geodesic, mix) with the test loss. The nets differ in the scale of their initial
values and in the learning rate; all stop at a train loss of 1e-6. Sharpness is maximised in beta space for the
actual X (see the module of that name); the radius is swept, since the paper names none.
"""

from dataclasses import dataclass
from typing import Any

import _beta_space
import matplotlib.pyplot as plt
import numpy as np
from _beta_space import Array
from _common import main
from matplotlib.figure import Figure

from symgeo.sharpness.correlation import RankCorrelation, kendall

PAPER = {"adaptive": -0.68, "inv": -0.83, "mix": -0.86, "mix_taylor2": -0.86}
RHOS = (0.01, 0.1, 0.5)
SHOWN = 0.1
TOLERANCE = 1e-6
NOTES = [
    "Sharpness is the largest rise of the train loss |X beta - y|^2 / n, maximised numerically in beta space "
    "from several starts, for the X of the regression and not for X^T X = 1.",
    "mix geodesics end where a coordinate of beta reaches zero, so the exact mix search stays in the orthant of "
    "beta, which is small for sparse nets. If signs could change, every interpolating net would have the same "
    "mix sharpness 2 rho^2 lambda_max(X^T X / n), but for what is left of its train loss.",
    "mix_taylor2 follows the second-order polynomial of the geodesic instead, past the end of its domain. Its "
    "value is then set by the smallest coordinates of beta, and can be astronomical. Its sign agrees with the "
    "paper's mix, and that of the exact mix does not; whether it is what the paper measured is not known.",
    "For small rho adaptive and inv agree to leading order, so their correlations do too.",
    "Tau depends on the problem and on how the nets are initialised: compare the problems listed here.",
]


@dataclass(frozen=True)
class Problem:
    """Noiseless sparse regression y = X target, with X (n, d) standard normal."""

    x: Array
    y: Array
    target: Array


def problem(seed: int, n: int = 20, d: int = 30, nonzero: int = 3) -> Problem:
    """A problem whose target has ``nonzero`` entries of size 1 and any sign."""
    generator = np.random.default_rng([seed, 0])
    x = generator.standard_normal((n, d))
    target = np.zeros(d)
    target[generator.choice(d, nonzero, replace=False)] = generator.choice([-1.0, 1.0], nonzero)
    return Problem(x, x @ target, target)


@dataclass(frozen=True)
class Nets:
    """Trained nets: beta (k, d), and the scale of the initial values and the learning rate of each (k,)."""

    beta: Array
    scale: Array
    rate: Array


def train(task: Problem, count: int, seed: int, steps: int = 60_000) -> Nets:
    """The first ``count`` nets that gradient descent brings to the train loss 1e-6, out of 1.5 times as many."""
    generator = np.random.default_rng([seed, 1])
    shape = (3 * count // 2, task.x.shape[1])
    scale = np.exp(generator.uniform(np.log(0.01), np.log(0.3), shape[0]))
    u, v = (scale[:, None] * generator.standard_normal(shape) for _ in range(2))
    curvature = np.linalg.eigvalsh(task.x.T @ task.x / len(task.y))[-1] * np.maximum(1, (u**2 + v**2).max(1))
    rate = np.exp(generator.uniform(np.log(0.05), np.log(0.7), shape[0])) / curvature
    active = np.arange(len(u))
    for _ in range(steps):
        active = active[_beta_space.loss(u[active] * v[active], task.x, task.y) > TOLERANCE]
        if not len(active):
            break
        left, right = u[active], v[active]
        step = rate[active, None] * _beta_space.gradient(left * right, task.x, task.y)
        u[active], v[active] = left - step * right, right - step * left
        active = active[np.abs(u[active]).max(1) < 1e3]  # the others have diverged
    done = np.flatnonzero(_beta_space.loss(u * v, task.x, task.y) <= TOLERANCE)[:count]
    return Nets((u * v)[done], scale[done], rate[done])


def measure(beta: Array, task: Problem, rho: float) -> dict[str, float]:
    """All sharpnesses of one net; the one place that knows how they are computed."""
    return {
        "adaptive": _beta_space.adaptive(beta, task.x, task.y, rho),
        "inv": _beta_space.inv(beta, task.x, task.y, rho),
        "mix": _beta_space.mix(beta, task.x, task.y, rho),
        "mix_taylor2": _beta_space.mix_taylor2(beta, task.x, task.y, rho),
    }


@dataclass(frozen=True)
class Study:
    """Nets of one problem, their test losses, and by radius and measure their sharpness and its correlation."""

    nets: Nets
    train: Array
    test: Array
    sharpness: dict[float, dict[str, Array]]
    taus: dict[float, dict[str, RankCorrelation]]

    def record(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "tau": {str(r): {m: vars(tau) for m, tau in row.items()} for r, row in self.taus.items()},
            "nets": len(self.test),
            "init_scale": self.nets.scale.tolist(),
            "lr": self.nets.rate.tolist(),
            "train_loss": self.train.tolist(),
            "test_loss": self.test.tolist(),
            "sharpness": {str(r): {m: s.tolist() for m, s in row.items()} for r, row in self.sharpness.items()},
        }


def study(count: int, seed: int) -> Study:
    """Make a problem, train its nets and measure them."""
    task = problem(seed)
    nets = train(task, count, seed)
    test = ((nets.beta - task.target) ** 2).sum(-1)  # the expected loss of standard normal inputs
    rows = {rho: [measure(beta, task, rho) for beta in nets.beta] for rho in RHOS}
    sharpness = {rho: {m: np.array([net[m] for net in row]) for m in PAPER} for rho, row in rows.items()}
    taus = {rho: {m: kendall(s, test, seed=seed) for m, s in row.items()} for rho, row in sharpness.items()}
    return Study(nets, _beta_space.loss(nets.beta, task.x, task.y), test, sharpness, taus)


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """The first problem as a picture, and the numbers of all: 1 problem (small) or 3 (full)."""
    count, problems = {"small": (8, 1), "full": (50, 3)}[size]
    studies = {number: study(count, number) for number in range(seed, seed + problems)}
    return _figure(studies[seed]), {
        "parameters": {"nets": count, "samples": 20, "features": 30, "nonzero": 3, "tolerance": TOLERANCE},
        "rhos": list(RHOS),
        "paper_tau": PAPER,
        "problems": {f"seed {number}": result.record() for number, result in studies.items()},
        "notes": NOTES,
    }


def _figure(result: Study) -> Figure:
    figure, axes = plt.subplots(1, 5, figsize=(14, 2.9))
    for ax, (name, values) in zip(axes, result.sharpness[SHOWN].items()):
        tau = result.taus[SHOWN][name]
        ax.scatter(values, result.test, s=12)
        xscale = "log" if values.max() > 100 * values.min() else "linear"
        ax.set(xscale=xscale, yscale="log", xlabel=f"{name} sharpness, rho = {SHOWN}", ylabel="test loss")
        ax.set_title(f"tau = {tau.tau:+.2f} [{tau.low:+.2f}, {tau.high:+.2f}]\npaper {PAPER[name]:+.2f}")
    for offset, name in enumerate(PAPER):
        row = [result.taus[rho][name] for rho in RHOS]
        middle = np.array([tau.tau for tau in row])
        # a bootstrap interval need not contain the estimate
        below = np.maximum(middle - [tau.low for tau in row], 0)
        above = np.maximum([tau.high for tau in row] - middle, 0)
        shifted = np.array(RHOS) * 1.12 ** (offset - 1)
        axes[-1].errorbar(shifted, middle, [below, above], fmt="o-", markersize=3, capsize=2, label=name)
    axes[-1].axhline(0, color="0.7", linewidth=0.8)
    axes[-1].set(xscale="log", xlabel="rho", ylabel="Kendall's tau", ylim=(-1.05, 1.05))
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    main("diagonal_nets", draw, __doc__.splitlines()[0])
