"""What the norm, the second-order correction and the exact geodesic each do to sharpness and its rank correlation.

Compare figures 9 and 10 of "Hide & Seek" (arXiv 2505.05409), which take the norm of the quotient metric and the
second-order term of its geodesic apart, for its two metrics. The exact geodesic is new here. Five searches for either
metric, all by Auto-PGD from the same start with the same number of steps:

    neither            |u / w| <= rho, straight lines: adaptive sharpness
    correction only    |u / w| <= rho, along w + u - Gamma(u, u) / 2
    norm only          |u|_w <= rho and u horizontal, straight lines
    both               |u|_w <= rho and u horizontal, along w + u - Gamma(u, u) / 2
    exact              |u|_w <= rho and u horizontal, along the geodesic
"""

from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _common import main
from _correlations import interval
from _populations import Population, handful, vision_transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from symgeo import ParameterManifold, geodesic_sharpness
from symgeo.demo.training import full as recipe
from symgeo.sharpness import kendall
from symgeo.sharpness.ascent import auto_pgd
from symgeo.study import Candidate

METRICS = ("inv", "mix")
ORDERS = {"norm only": "linear", "both": "taylor2", "exact": "exact"}
VARIANTS = ("neither", "neither, exp", *(f"{m}: {v}" for m in METRICS for v in ("correction only", *ORDERS)))
GAP = "loss gap"
NOTES = [
    "The curves are those of all parameters: what no pair owns has the metric sum (u / w)^2, with the curves w + u, "
    "w (1 + u / w + (u / w)^2 / 2) and w exp(u / w). 'neither, exp' has the last of these for all parameters and no "
    "symmetry: what it differs by from 'neither' is not due to attention.",
    "Ratios are medians over models: of 'norm only' and 'both' to 'exact' of the same metric, and in the elementwise "
    "ball to 'neither'.",
    "mix geodesics may end before length rho; the search then stays below. The second-order curve does not end.",
    "Searches in the elementwise ball depend on the gauge, those in the metric's do not.",
]
COLOURS = {"neither": "#E69F00", "neither, exp": "#CC79A7", "correction only": "#56B4E9", "norm only": "#009E73",
           "both": "#0072B2", "exact": "#000000"}  # fmt: skip


def elementwise_ball(candidate: Candidate, metric: str, rho: float, steps: int, seed: int) -> float:
    """The largest increase along second-order curves of a metric whose velocities are bounded elementwise."""
    params, batch = candidate.params, candidate.batches[0]
    manifold = ParameterManifold(params, candidate.symmetry, metric)
    sizes = {name: p.numel() for name, p in params.items()}

    def objective(z: Tensor) -> tuple[float, Tensor]:
        z = z.detach().requires_grad_()
        pieces = dict(zip(sizes, z.split(list(sizes.values()))))
        velocity = {name: p * pieces[name].view_as(p) for name, p in params.items()}
        value = candidate.loss(manifold.geodesic(params, velocity, "taylor2")(1.0), batch)
        return float(value.detach()), torch.autograd.grad(value, z)[0]

    generator = torch.Generator().manual_seed(seed)
    start = torch.zeros(sum(sizes.values()), dtype=next(iter(params.values())).dtype)
    found = auto_pgd(objective, start, rho, steps, lambda: torch.randn(start.shape, generator=generator).to(start))
    return found.value - found.history[0]


def measure(candidate: Candidate, variant: str, rho: float, steps: int, seed: int) -> float:
    """The sharpness of one model by one of ``VARIANTS``."""
    metric, _, form = variant.rpartition(": ")
    if form == "correction only":
        return elementwise_ball(candidate, metric, rho, steps, seed)
    if metric:
        manifold, curve = ParameterManifold(candidate.params, candidate.symmetry, metric), ORDERS[form]
    else:
        manifold, curve = ParameterManifold(candidate.params), "exact" if form.endswith("exp") else "linear"
    given = candidate.loss, candidate.params, candidate.batches
    return geodesic_sharpness(*given, manifold, rho, steps, curve, seed).value


@dataclass(frozen=True)
class Ablation:
    """Sharpness of every model by radius and variant, and the correlations with the gap."""

    population: Population
    sharpness: dict[float, dict[str, list[float]]]

    def tau(self, rho: float, variant: str, seed: int) -> Any:
        """Kendall's tau with the loss gap."""
        gaps = [candidate.gaps[GAP] for candidate in self.population.candidates]
        return kendall(self.sharpness[rho][variant], gaps, seed=seed)

    def ratios(self, variant: str) -> dict[float, float]:
        """The median over models of the sharpness to that of the exact curve in the same ball, by radius."""
        metric, _, form = variant.rpartition(": ")
        exact = f"{metric}: exact" if form in ORDERS else "neither"
        return {rho: float(np.median(np.divide(row[variant], row[exact]))) for rho, row in self.sharpness.items()}

    def record(self, seed: int) -> dict[str, Any]:
        """All numbers, for JSON."""
        rows = self.sharpness.items()
        return {
            "tau": {f"{rho:g}": {v: vars(self.tau(rho, v, seed)) for v in row} for rho, row in rows},
            "median_ratio": {v: {f"{r:g}": x for r, x in self.ratios(v).items()} for v in VARIANTS},
            "sharpness": {f"{rho:g}": row for rho, row in rows},
            "gap": [candidate.gaps[GAP] for candidate in self.population.candidates],
            "population": self.population.record(),
        }


def ablation(population: Population, rhos: tuple[float, ...], steps: int, seed: int) -> Ablation:
    """Every model by every variant at every radius."""
    return Ablation(population, {
        rho: {v: [measure(c, v, rho, steps, seed) for c in population.candidates] for v in VARIANTS} for rho in rhos
    })  # fmt: skip


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """Ratios to the exact sharpness over the radius, and tau at every radius, of vision transformers."""
    if size == "full":
        rhos, steps = (0.3, 1.0), 8
        population = vision_transformers(recipe(seed), 64, torch.float64)
    else:
        rhos, steps = (0.3,), 3
        population = handful(seed, torch.float64)
    found = ablation(population, rhos, steps, seed)
    return _figure(found, seed), {
        "parameters": {"rhos": list(rhos), "steps": steps, "variants": list(VARIANTS)},
        "vision transformers": found.record(seed),
        "notes": NOTES,
    }


def _figure(found: Ablation, seed: int) -> Figure:
    figure, (left, *others) = plt.subplots(1, 3, figsize=(11.5, 3.6))
    _ratios(left, found)
    for ax, metric in zip(others, METRICS):
        _taus(ax, found, metric, seed)
    figure.legend(*others[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def _ratios(ax: Axes, result: Ablation) -> None:
    for variant in VARIANTS:
        metric, _, form = variant.rpartition(": ")
        if form != "exact" and variant != "neither":
            ratios = result.ratios(variant)
            line = "--" if metric == "mix" else "-"
            ax.plot(list(ratios), list(ratios.values()), f"o{line}", color=COLOURS[form], markersize=3, label=variant)
    ax.axhline(1, color="0.7", linewidth=0.8, zorder=0)
    ax.set_xticks([float(rho) for rho in result.sharpness], [f"{rho:g}" for rho in result.sharpness])
    ax.minorticks_off()
    ax.set(xlabel="rho", ylabel="median over models", title="sharpness / 'exact' (corrections: / 'neither')")
    ax.margins(y=0.25)
    ax.legend(fontsize=7, loc="upper left", ncols=2)


def _taus(ax: Axes, result: Ablation, metric: str, seed: int) -> None:
    """Tau at every radius, the variants side by side."""
    variants = {"neither": "neither", "neither, exp": "neither, exp"}
    variants |= {form: f"{metric}: {form}" for form in ("correction only", *ORDERS)}
    for i, (form, variant) in enumerate(variants.items()):
        x = [k + 0.13 * (i - 2.5) for k in range(len(result.sharpness))]
        row = [result.tau(rho, variant, seed) for rho in result.sharpness]
        interval(ax, x, row, color=COLOURS[form], fmt="o", markersize=4, label=form)
    ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    ax.set_xticks(range(len(result.sharpness)), [f"rho = {rho:g}" for rho in result.sharpness])
    ax.set(ylim=(-1.05, 1.05), title=f"{metric}: Kendall's tau with the {GAP}")


if __name__ == "__main__":
    main("geodesic_order", draw, __doc__.splitlines()[0])
