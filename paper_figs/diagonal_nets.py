"""Sharpness against generalization of diagonal linear nets u * v = beta trained on sparse regression.

Compare figure 3 of "Hide & Seek" (arXiv 2505.05409), which reports Kendall's tau of -0.68 (adaptive), -0.83
(geodesic, inv) and -0.86 (geodesic, mix) with the test loss. The nets differ in the scale of their initial
values and in the learning rate; all stop at a train loss of 1e-6. Sharpness is measured on the parameters (u, v)
by symgeo, and independently by maximising over beta (see the module _beta_space); the radius is swept, since the
paper names none.
"""

from dataclasses import dataclass
from typing import Any

import _beta_space
import matplotlib.pyplot as plt
import numpy as np
import torch
from _beta_space import Array
from _common import main
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from symgeo import ParameterManifold, Symmetry, adaptive_sharpness, geodesic_sharpness
from symgeo.functional import Params
from symgeo.groups import GeneralLinear
from symgeo.sharpness.correlation import RankCorrelation, kendall

PAPER = {"adaptive": -0.68, "inv": -0.83, "mix": -0.86, "mix_taylor2": -0.86}
PACKAGE = ("adaptive", "inv", "mix_taylor2")
RHOS = (0.01, 0.1, 0.5)
SHOWN = 0.1
TOLERANCE = 1e-6
STEPS = 60
SYMMETRY = Symmetry({"u": "(h e)", "v": "(h e*)"}, {"e": GeneralLinear(per="h")}, sizes={"e": 1})
NOTES = [
    "Sharpness is the largest rise of the train loss |X beta - y|^2 / n for the X of the regression, and not for "
    "X^T X = 1. The package climbs from the unperturbed parameters and tries the side opposite to its best point; "
    "the search over beta climbs from many starts of both signs. Both are lower bounds of the maximum, and the larger "
    "one is the better.",
    "At an interpolating net the loss is nearly even in the perturbation: the maxima near xi and -xi differ by a "
    "relative O(rho). At large rho there are more, and the package may end at a lower one.",
    "mix geodesics end where a coordinate of beta reaches zero, so the exact mix search stays in the orthant of "
    "beta, which is small for sparse nets: it is done over beta only, since the package's search, which rejects "
    "what is beyond the end, is slow there and stops far below the maximum. If signs could change, every "
    "interpolating net would have the same mix sharpness 2 rho^2 lambda_max(X^T X / n), but for what is left of "
    "its train loss.",
    "mix_taylor2 follows the second-order polynomial of the geodesic instead, past the end of its domain. Its "
    "maximum is set by the smallest coordinates of beta, and can be astronomical; a climb from one start need not "
    "find it. Whether it is what the paper measured is not known.",
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
    """Trained nets: u and v (k, d), and the scale of the initial values and the learning rate of each (k,)."""

    u: Array
    v: Array
    scale: Array
    rate: Array

    @property
    def beta(self) -> Array:
        """What the nets compute, u * v."""
        return self.u * self.v


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
    return Nets(u[done], v[done], scale[done], rate[done])


def train_loss(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean squared error of f(x) = <x, u * v>."""
    x, y = batch
    return (x @ (params["u"] * params["v"]) - y).square().mean()


def measure(u: Array, v: Array, task: Problem, rho: float) -> dict[str, float]:
    """The sharpnesses of one net by the package, which knows its symmetry (u, v) ~ (u / a, a v)."""
    params = {"u": torch.from_numpy(u), "v": torch.from_numpy(v)}
    batches = [(torch.from_numpy(task.x), torch.from_numpy(task.y))]
    inv, mix = (ParameterManifold(params, SYMMETRY, metric) for metric in ("inv", "mix"))
    results = {
        "adaptive": adaptive_sharpness(train_loss, params, batches, rho, STEPS),
        "inv": geodesic_sharpness(train_loss, params, batches, inv, rho, STEPS),
        "mix_taylor2": geodesic_sharpness(train_loss, params, batches, mix, rho, STEPS, geodesic="taylor2"),
    }
    return {name: result.value for name, result in results.items()}


def measure_beta(beta: Array, task: Problem, rho: float) -> dict[str, float]:
    """The same sharpnesses, and the exact mix, by searches over beta that share no code with the package."""
    return {
        "adaptive": _beta_space.adaptive(beta, task.x, task.y, rho),
        "inv": _beta_space.inv(beta, task.x, task.y, rho),
        "mix": _beta_space.mix(beta, task.x, task.y, rho),
        "mix_taylor2": _beta_space.mix_taylor2(beta, task.x, task.y, rho),
    }


@dataclass(frozen=True)
class Measured:
    """By radius and measure: the sharpness of every net, and its correlation with the test loss."""

    sharpness: dict[float, dict[str, Array]]
    taus: dict[float, dict[str, RankCorrelation]]

    def record(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "tau": {str(r): {m: vars(tau) for m, tau in row.items()} for r, row in self.taus.items()},
            "sharpness": {str(r): {m: s.tolist() for m, s in row.items()} for r, row in self.sharpness.items()},
        }


@dataclass(frozen=True)
class Study:
    """Nets of one problem, their losses, and their sharpness by the package and by the search over beta."""

    nets: Nets
    train: Array
    test: Array
    package: Measured
    beta: Measured

    def shown(self, rho: float, name: str) -> tuple[Array, RankCorrelation]:
        """Sharpness and tau of a measure: the package's, but for the exact mix."""
        source = self.package if name in PACKAGE else self.beta
        return source.sharpness[rho][name], source.taus[rho][name]

    def agreement(self) -> dict[str, Any]:
        """How far the package's values are below (negative) or above those of the search over beta, relatively."""
        pairs = {
            (rho, name): self.package.sharpness[rho][name] / self.beta.sharpness[rho][name] - 1
            for rho in RHOS
            for name in PACKAGE
        }
        summary = {key: (float(d.min()), float(d.max()), int((np.abs(d) <= 1e-6).sum())) for key, d in pairs.items()}
        keys = ("lowest", "highest", "nets_that_agree_to_1e-6")
        return {str(rho): {name: dict(zip(keys, summary[rho, name])) for name in PACKAGE} for rho in RHOS}

    def record(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "nets": len(self.test),
            "init_scale": self.nets.scale.tolist(),
            "lr": self.nets.rate.tolist(),
            "train_loss": self.train.tolist(),
            "test_loss": self.test.tolist(),
            "package": self.package.record(),
            "beta_space": self.beta.record(),
            "package_over_beta_space_minus_1": self.agreement(),
        }


def study(count: int, seed: int) -> Study:
    """Make a problem, train its nets and measure them in both ways."""
    task = problem(seed)
    nets = train(task, count, seed)
    test = ((nets.beta - task.target) ** 2).sum(-1)  # the expected loss of standard normal inputs

    def correlate(rows: dict[float, list[dict[str, float]]]) -> Measured:
        sharpness = {rho: {m: np.array([net[m] for net in row]) for m in row[0]} for rho, row in rows.items()}
        taus = {rho: {m: kendall(s, test, seed=seed) for m, s in row.items()} for rho, row in sharpness.items()}
        return Measured(sharpness, taus)

    package = correlate({rho: [measure(u, v, task, rho) for u, v in zip(nets.u, nets.v)] for rho in RHOS})
    beta = correlate({rho: [measure_beta(beta, task, rho) for beta in nets.beta] for rho in RHOS})
    return Study(nets, _beta_space.loss(nets.beta, task.x, task.y), test, package, beta)


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """The first problem as a picture, and the numbers of all: 1 problem (small) or 3 (full)."""
    count, problems = {"small": (4, 1), "full": (50, 3)}[size]
    studies = {number: study(count, number) for number in range(seed, seed + problems)}
    return _figure(studies[seed]), {
        "parameters": {
            "nets": count,
            "samples": 20,
            "features": 30,
            "nonzero": 3,
            "tolerance": TOLERANCE,
            "steps": STEPS,
        },
        "rhos": list(RHOS),
        "paper_tau": PAPER,
        "problems": {f"seed {number}": result.record() for number, result in studies.items()},
        "notes": NOTES,
    }


def _figure(result: Study) -> Figure:
    figure, axes = plt.subplots(1, 5, figsize=(14, 2.9))
    for ax, name in zip(axes, PAPER):
        values, tau = result.shown(SHOWN, name)
        ax.scatter(values, result.test, s=12)
        xscale = "log" if values.max() > 100 * values.min() else "linear"
        ax.set(xscale=xscale, yscale="log", xlabel=f"{name} sharpness, rho = {SHOWN}", ylabel="test loss")
        over_beta = f"over beta {result.beta.taus[SHOWN][name].tau:+.2f}" if name in PACKAGE else "(over beta)"
        ax.set_title(f"tau = {tau.tau:+.2f} [{tau.low:+.2f}, {tau.high:+.2f}]\n{over_beta}, paper {PAPER[name]:+.2f}")
    _taus(axes[-1], result)
    return figure


def _taus(ax: Axes, result: Study) -> None:
    """Tau with its interval over the radius, and hollow what the search over beta finds for the same measure."""
    for offset, name in enumerate(PAPER):
        shifted = np.array(RHOS) * 1.12 ** (offset - 1)
        row = [result.shown(rho, name)[1] for rho in RHOS]
        middle = np.array([tau.tau for tau in row])
        # a bootstrap interval need not contain the estimate
        below = np.maximum(middle - [tau.low for tau in row], 0)
        above = np.maximum([tau.high for tau in row] - middle, 0)
        label = name if name in PACKAGE else f"{name} (over beta)"
        color = f"C{offset}"
        ax.errorbar(shifted, middle, [below, above], fmt="o-", markersize=3, capsize=2, color=color, label=label)
        hollow = [result.beta.taus[rho][name].tau for rho in RHOS]
        ax.plot(shifted, hollow, "o", markersize=6, markerfacecolor="none", color=color)
    ax.axhline(0, color="0.7", linewidth=0.8)
    ax.set(xscale="log", xlabel="rho", ylabel="Kendall's tau", ylim=(-1.05, 1.05), title="hollow: over beta")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    main("diagonal_nets", draw, __doc__.splitlines()[0])
