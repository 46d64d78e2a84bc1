"""Relaxed Gram matrices: M + eps I as in print against the covariant M + eps (M_G # M_H^-1), metric inv.

Compare figure 11 of "Hide & Seek" (arXiv 2505.05409), which varies eps. Left: along gauge orbits of one vision
transformer, how much the sharpness of the same network changes. Middle: Kendall's tau with the loss gap over eps,
for vision transformers as they were trained, and after every one of them was moved to another gauge at random, in
which it is still the same function. Right: the sharpness itself, relative to eps = 0.
"""

from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _common import main
from _correlations import interval
from _plain_relaxation import plain_sharpness
from _populations import handful, vision_transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from symgeo import ParameterManifold, geodesic_sharpness
from symgeo.demo.orbit import gauge_change
from symgeo.demo.training import full as recipe
from symgeo.plots import TINY
from symgeo.sharpness import RankCorrelation, kendall
from symgeo.study import Candidate

CONDITIONS = (1.0, 3.0, 10.0, 30.0, 100.0)
RHO = 0.3
KINDS = {"plain": ("#D55E00", "s", "--"), "covariant": ("#0072B2", "o", "-")}
GAUGES = ("trained", "moved")
NOTES = [
    "Straight lines in both, horizontal for their own metric, and the same search. The two are the same metric at "
    "eps = 0, and for every eps in the balanced gauge.",
    "Orbits: the largest change over the draws. Moved: one draw for each model, of the condition number given.",
    "The paper names no eps and no radius.",
]


def moved(candidate: Candidate, condition: float, seed: int) -> Candidate:
    """The same function in another gauge: one random matrix of the condition number for every pair of every head."""
    assert candidate.symmetry is not None
    action = candidate.symmetry.bind(candidate.params)
    element = gauge_change(action, condition, torch.Generator().manual_seed(seed))
    return replace(candidate, params=action.act(element, candidate.params))


def sharpness(candidate: Candidate, kind: str, eps: float, steps: int) -> float:
    """By straight lines, in one of ``KINDS`` of relaxation."""
    manifold = ParameterManifold(candidate.params, candidate.symmetry, eps=eps if kind == "covariant" else 0.0)
    if kind == "plain":
        return plain_sharpness(candidate, manifold, eps, RHO, steps)
    return geodesic_sharpness(candidate.loss, candidate.params, candidate.batches, manifold, RHO, steps, "linear").value


def along_orbits(start: Candidate, epsilons: tuple[float, ...], draws: int, steps: int, seed: int) -> dict[str, Any]:
    """The largest |S(g w) / S(w) - 1| by kind, eps and condition number."""
    found: dict[str, Any] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for eps in epsilons:
            base = sharpness(start, kind, eps, steps)
            found[kind][f"{eps:g}"] = [
                max(abs(sharpness(moved(start, c, seed + k), kind, eps, steps) / base - 1) for k in range(draws))
                for c in CONDITIONS
            ]
    return found


def over_models(
    candidates: list[Candidate], epsilons: tuple[float, ...], condition: float, steps: int, seed: int
) -> dict[str, dict[str, list[list[float]]]]:
    """The sharpness of every model by gauge, kind, eps."""
    elsewhere = [moved(candidate, condition, seed + i) for i, candidate in enumerate(candidates)]
    return {
        gauge: {kind: [[sharpness(c, kind, eps, steps) for c in models] for eps in epsilons] for kind in KINDS}
        for gauge, models in zip(GAUGES, (candidates, elsewhere))
    }


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """Change along orbits; tau and sharpness over eps."""
    if size == "full":
        population = vision_transformers(recipe(seed), 64, torch.float64)
        epsilons, shown, draws, steps = (0.0, 1e-4, 1e-2, 0.1, 1.0, 10.0), (0.0, 1e-4, 1e-2, 1.0), 2, 8
    else:
        population = handful(seed, torch.float64)
        epsilons, shown, draws, steps = (0.0, 1e-2), (0.0, 1e-2), 1, 3
    candidates = population.candidates
    orbits = along_orbits(candidates[0], shown, draws, steps, seed)
    found = over_models(candidates, epsilons, CONDITIONS[-1], steps, seed)
    gaps = [candidate.gaps["loss gap"] for candidate in candidates]
    taus = {
        gauge: {kind: [kendall(values, gaps, seed=seed) for values in rows] for kind, rows in kinds.items()}
        for gauge, kinds in found.items()
    }
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8))
    _orbits(left, orbits)
    _taus(middle, taus, epsilons)
    _sharpness(right, found, epsilons)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure, {
        "parameters": {"rho": RHO, "steps": steps, "conditions": list(CONDITIONS), "draws": draws,
                       "condition_of_moved": CONDITIONS[-1], "eps": list(epsilons)},
        "orbit": orbits,
        "tau": {g: {k: [vars(tau) for tau in row] for k, row in kinds.items()} for g, kinds in taus.items()},
        "sharpness": found,
        "gap": gaps,
        "population": population.record(),
        "notes": NOTES,
    }  # fmt: skip


def _orbits(ax: Axes, orbits: dict[str, Any]) -> None:
    for kind, rows in orbits.items():
        colour, marker, line = KINDS[kind]
        for i, (eps, changes) in enumerate(rows.items()):
            style: dict[str, Any] = {"alpha": 0.4 + 0.6 * (i + 1) / len(rows), "linewidth": 0.7 + 0.4 * i}
            label = f"{kind}, eps = {eps}"
            ax.plot(CONDITIONS, np.maximum(changes, TINY), line, color=colour, marker=marker, markersize=4, label=label,
                    **style)  # fmt: skip
    ax.set(xscale="log", yscale="log", ylabel="largest |S(g w) / S(w) - 1|", title="one network along gauge orbits")
    ax.set_xlabel("condition number of the gauge change")
    ax.set_xticks(CONDITIONS, [f"{c:g}" for c in CONDITIONS])
    ax.minorticks_off()
    ax.legend(fontsize=7, loc="center right")


def _places(epsilons: tuple[float, ...]) -> list[float]:
    """Where an eps is drawn on a logarithmic axis; 0 a decade to the left of the smallest."""
    return [eps or min(e for e in epsilons if e) / 10 for eps in epsilons]


def _axis(ax: Axes, epsilons: tuple[float, ...]) -> None:
    ax.set(xscale="log", xlabel="eps")
    ax.set_xticks(_places(epsilons), [f"{eps:g}" for eps in epsilons])
    ax.minorticks_off()


def _taus(ax: Axes, taus: dict[str, dict[str, list[RankCorrelation]]], epsilons: tuple[float, ...]) -> None:
    for i, (gauge, kinds) in enumerate(taus.items()):
        for j, (kind, row) in enumerate(kinds.items()):
            colour, marker, line = KINDS[kind]
            x = [place * 1.25 ** (2 * i + j - 1.5) for place in _places(epsilons)]
            face = colour if gauge == "trained" else "none"
            interval(ax, x, row, color=colour, marker=marker, linestyle=line, markersize=4, markerfacecolor=face,
                     linewidth=0.8)  # fmt: skip
    ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    ax.set(ylim=(-1.05, 1.05), title="Kendall's tau with the loss gap")
    _axis(ax, epsilons)


def _sharpness(ax: Axes, found: dict[str, Any], epsilons: tuple[float, ...]) -> None:
    for gauge, kinds in found.items():
        for kind, rows in kinds.items():
            colour, marker, line = KINDS[kind]
            ratios = [float(np.median(np.divide(row, found["trained"]["covariant"][0]))) for row in rows]
            face = colour if gauge == "trained" else "none"
            ax.plot(_places(epsilons), ratios, line, color=colour, marker=marker, markersize=4, markerfacecolor=face,
                    linewidth=1.0, label=f"{kind}, gauge {gauge}")  # fmt: skip
    ax.set(title="sharpness / that at eps = 0, median over models")
    _axis(ax, epsilons)


if __name__ == "__main__":
    main("relaxation", draw, __doc__.splitlines()[0])
