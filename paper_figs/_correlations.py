"""Studies of sharpness and generalization as pictures: the models themselves, and Kendall's tau over the radius."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from symgeo.plots import LOOK
from symgeo.sharpness import kendall
from symgeo.study import Correlation, Study

Row = tuple[str, Study, str]  # title, study, gap


def draw_studies(rows: Sequence[Row], shown: Mapping[str, float], paper: Mapping[str, float]) -> Figure:
    """A line for each study and gap: a panel for each measure at the radius ``shown``, and one of tau over rho."""
    width = len(shown) + 1
    figure, lines = plt.subplots(len(rows), width, figsize=(2.5 * width + 1.2, 2.6 * len(rows) + 0.4), squeeze=False)
    for line, (title, study, gap) in zip(lines, rows):
        for ax, (measure, rho) in zip(line, shown.items()):
            _models(ax, study, gap, measure, rho, paper.get(measure))
        line[0].set_ylabel(f"{title}:\n{gap}")
        taus(line[-1], [c for c in study.correlations if c.gap == gap])
    for ax in lines[-1][:-1]:
        ax.set_xlabel("sharpness")
    lines[-1][-1].set_xlabel("rho")
    handles, labels = lines[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(shown))
    return figure


def _models(ax: Axes, study: Study, gap: str, measure: str, rho: float, paper: float | None) -> None:
    colour, marker = LOOK[measure]
    values = study.values(measure, rho)
    x, y = list(values.values()), [study.gaps[name][gap] for name in values]
    ax.scatter(x, y, s=14, color=colour, marker=marker, alpha=0.8, linewidths=0)
    found = next(c for c in study.correlations if (c.measure, c.rho, c.gap) == (measure, rho, gap))
    theirs = "" if paper is None else f", paper {paper:+.2f}"
    ax.set_title(f"{measure}, rho = {rho:g}{theirs}\ntau = {found}", fontsize=8)
    if min(x) > 0 and max(x) > 30 * min(x):
        ax.set_xscale("log")
    else:
        ax.locator_params(nbins=4)


def taus(ax: Axes, correlations: Sequence[Correlation]) -> None:
    """Tau of every measure with its interval, over the radius."""
    measures = list(dict.fromkeys(c.measure for c in correlations))
    for i, measure in enumerate(measures):
        row = [c for c in correlations if c.measure == measure and c.tau is not None]
        colour, marker = LOOK[measure]
        x = [c.rho * 1.08 ** (i - (len(measures) - 1) / 2) for c in row]
        interval(ax, x, row, color=colour, marker=marker, label=measure, markersize=4, linewidth=1.0)
    ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    ax.set(xscale="log", ylim=(-1.05, 1.05))
    ax.set_title("Kendall's tau, 95 % interval", fontsize=8)


def interval(ax: Axes, x: Sequence[float], row: Sequence[Any], **style: Any) -> None:
    """Values of ``tau`` with bars from ``low`` to ``high``, which a bootstrap interval may have on one side of it."""
    middle = np.array([c.tau for c in row], dtype=float)
    below = np.maximum(middle - np.array([c.low for c in row], dtype=float), 0)
    above = np.maximum(np.array([c.high for c in row], dtype=float) - middle, 0)
    ax.errorbar(x, middle, [below, above], capsize=2, elinewidth=0.8, **style)


def restricted(study: Study, names: Collection[str], seed: int) -> Study:
    """The same study with some of its models only; what was measured is not measured again."""
    gaps = {name: found for name, found in study.gaps.items() if name in names}
    part = Study(gaps, tuple(m for m in study.measurements if m.model in names))
    correlations = []
    for c in study.correlations:
        values = part.values(c.measure, c.rho)
        tau = kendall(list(values.values()), [gaps[name][c.gap] for name in values], seed=seed)
        correlations.append(Correlation(c.measure, c.rho, c.gap, tau.n, tau.tau, tau.low, tau.high, tau.pvalue))
    return replace(part, correlations=tuple(correlations))


def table(study: Study) -> dict[str, dict[str, dict[str, Any]]]:
    """Tau by gap, measure and radius, for JSON."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for c in study.correlations:
        row = {"tau": c.tau, "low": c.low, "high": c.high, "pvalue": c.pvalue, "n": c.n, "reason": c.reason}
        found.setdefault(c.gap, {}).setdefault(c.measure, {})[f"{c.rho:g}"] = row
    return found


def paired(
    first: Sequence[float], second: Sequence[float], gaps: Sequence[float], seed: int, resamples: int = 2000
) -> dict[str, float]:
    """tau-b(second, gaps) - tau-b(first, gaps), and the 95 % percentile bootstrap of that difference.

    Both are taken of the same resample of the models, which decides more about tau than the measure does.
    """
    drawn = np.random.default_rng(seed).integers(len(gaps), size=(resamples, len(gaps)))
    drawn = np.vstack([np.arange(len(gaps)), drawn])

    def signs(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
        rows = np.asarray(values, dtype=float)[drawn]
        return np.sign(rows[:, :, None] - rows[:, None, :]).reshape(len(rows), -1)

    y = signs(gaps)
    taus = [(x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1)) for x in map(signs, (first, second))]
    differences = taus[1] - taus[0]
    low, high = np.nanquantile(differences[1:], [0.025, 0.975])
    return {"difference": float(differences[0]), "low": float(low), "high": float(high)}


def inv_less_adaptive(study: Study, gap: str, seed: int) -> list[dict[str, float]]:
    """tau of geodesic inv less that of adaptive sharpness, column by column of their radii."""
    radii = [[c.rho for c in study.correlations if (c.measure, c.gap) == (measure, gap)]
             for measure in ("adaptive", "geodesic inv")]
    rows = []
    for a, b in zip(*radii):
        one, other = study.values("adaptive", a), study.values("geodesic inv", b)
        names = [name for name in one if name in other]
        found = paired([one[n] for n in names], [other[n] for n in names], [study.gaps[n][gap] for n in names], seed)
        rows.append({"rho of adaptive": a, "rho of inv": b, **found})
    return rows
