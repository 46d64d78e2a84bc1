"""Figures in one style: readable without colour vision, drawn without a display."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symgeo.report import prepare, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from symgeo.demo.orbit import Orbit
    from symgeo.flatness import Flatness
    from symgeo.merge.barrier import Barrier
    from symgeo.sharpness import SharpnessResult
    from symgeo.study import Correlation, Study
    from symgeo.symmetry import Symmetry

FORMATS = (".png", ".pdf")
TINY = 1e-17  # drawn in place of no change at all, which a logarithmic axis has no place for
# Okabe and Ito's colours, and a marker for each measure
LOOK = {
    "euclidean": ("#555555", "s"),
    "adaptive": ("#E69F00", "^"),
    "geodesic inv": ("#0072B2", "o"),
    "geodesic mix": ("#009E73", "D"),
}
LINES = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#555555", "x"))
PALETTE = ("#0072B2", "#D55E00", "#CC79A7", "#009E73", "#56B4E9", "#F0E442")
FONT: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def target(path: str | Path) -> Path:
    """``path`` if a figure can be written there; ``ValueError`` for a suffix other than .png and .pdf."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a figure is written as {' or '.join(FORMATS)}; give the file one of these suffixes")
    return prepare(path)


def plot_tau(correlations: Sequence[Correlation], path: str | Path) -> None:
    """Kendall's tau with its interval over the radius: one panel for each gap, one marker for each measure."""
    gaps = list(dict.fromkeys(c.gap for c in correlations))
    measures = list(dict.fromkeys(c.measure for c in correlations))
    figure, panels = _figure(max(len(gaps), 1), 1, height=3.6)
    for axes, gap in zip(panels, gaps):
        for i, measure in enumerate(measures):
            found = [c for c in correlations if c.gap == gap and c.measure == measure and c.tau is not None]
            _intervals(axes, found, 1 + 0.09 * (i - (len(measures) - 1) / 2))
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(
            title=f"rank correlation with the {gap}", xlabel="radius rho, in each measure's own units", ylim=(-1, 1)
        )
        _radius_axis(axes, sorted({c.rho for c in correlations if c.rho > 0}))
    panels[0].set_ylabel("Kendall's tau, 95 % bootstrap interval")
    _legend_below(figure, panels[0])
    _save(figure, path)


def _intervals(axes: Axes, found: Sequence[Correlation], shift: float) -> None:
    if not found:
        return
    colour, marker = LOOK[found[0].measure]
    tau = [c.tau or 0.0 for c in found]
    bars = [
        [max(t - (c.low or 0.0), 0.0) for t, c in zip(tau, found)],
        [max((c.high or 0.0) - t, 0.0) for t, c in zip(tau, found)],
    ]
    axes.errorbar(
        [c.rho * shift for c in found],
        tau,
        yerr=bars,
        label=found[0].measure,
        color=colour,
        marker=marker,
        markersize=5,
        capsize=2.5,
        linewidth=1.2,
        elinewidth=1.0,
    )


def _radius_axis(axes: Axes, radii: Sequence[float]) -> None:
    if not radii:
        return
    axes.set_xscale("log")
    ticks = [radii[0]]
    for rho in radii:
        if rho > 1.8 * ticks[-1]:  # labels closer than this overlap
            ticks.append(rho)
    axes.set_xticks(ticks, [f"{rho:g}" for rho in ticks])
    axes.minorticks_off()
    axes.set_xlim(radii[0] / 1.4, radii[-1] * 1.4)


def plot_scatter(study: Study, radii: Mapping[str, float], path: str | Path) -> None:
    """Sharpness against each gap, one column for each measure at the radius given for it."""
    gaps = list(dict.fromkeys(c.gap for c in study.correlations))
    figure, panels = _figure(len(radii), len(gaps), height=2.3 * len(gaps) + 0.3, width=9.6)
    for k, (axes, gap, measure) in enumerate(
        (panels[i * len(radii) + j], gap, measure) for i, gap in enumerate(gaps) for j, measure in enumerate(radii)
    ):
        _scatter(axes, study, gap, measure, radii[measure])
        if k % len(radii) == 0:
            axes.set_ylabel(gap)
        if k >= len(radii) * (len(gaps) - 1):
            axes.set_xlabel("sharpness")
    _save(figure, path)


def _scatter(axes: Axes, study: Study, gap: str, measure: str, rho: float) -> None:
    values = {m: v for m, v in study.values(measure, rho).items() if gap in study.gaps[m]}
    colour, marker = LOOK[measure]
    axes.scatter(
        list(values.values()),
        [study.gaps[m][gap] for m in values],
        color=colour,
        marker=marker,
        s=22,
        alpha=0.8,
        linewidths=0,
    )
    found = [c for c in study.correlations if (c.measure, c.rho, c.gap) == (measure, rho, gap)]
    axes.set_title(f"{measure}, rho = {rho:g}\ntau = {found[0] if found else '-'}", fontsize=8)
    axes.locator_params(nbins=4)


def plot_orbit(orbit: Orbit, path: str | Path) -> None:
    """Along one orbit: sharpness relative to the start, and what the function and the sharpness change by."""
    figure, (left, right) = _figure(2, 1, height=3.6)
    for measure in orbit.sharpness:
        colour, marker = LOOK[measure]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.2, "label": measure}
        left.plot(orbit.conditions, orbit.relative(measure), **style)
        right.plot(orbit.conditions, [max(change, TINY) for change in orbit.change(measure)], **style)
    right.plot(
        orbit.conditions,
        [max(change, TINY) for change in orbit.output_change],
        color="#CC79A7",
        marker="x",
        linestyle=":",
        linewidth=1.2,
        label="outputs of the model",
    )
    left.axhline(1, color="black", linewidth=0.8)
    left.set(title="sharpness along the orbit", ylabel="relative to the trained parameters", yscale="log")
    right.set(title="the same, as relative change", ylabel="against the trained parameters", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="condition number of the gauge change", xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
    _legend_below(figure, right)
    _save(figure, path)


def plot_history(result: SharpnessResult, path: str | Path) -> None:
    """The increase of the loss over the evaluations of the search: one line for each batch, and the mean."""
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = _figure(1, 1, height=3.4, width=5.2)
    for history in result.history:
        axes.plot([value - history[0] for value in history], color="#0072B2", alpha=0.35, linewidth=1)
    axes.axhline(result.value, color="#D55E00", linewidth=1.2, linestyle="--")
    axes.set(
        title=f"{result.kind} sharpness {result.value:.4g} (dashed), rho = {result.rho:g}",
        xlabel="evaluation",
        ylabel="increase of the loss of each batch",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def plot_barrier(curves: Mapping[str, Barrier], path: str | Path) -> None:
    """The loss along paths between two models, one line for each, with the height of its barrier in the legend.

    Raises ``ValueError`` without curves, and for a file that is neither .png nor .pdf.
    """
    if not curves:
        raise ValueError("curves: needed at least one, found none")
    figure, (axes,) = _figure(1, 1, height=3.4, width=5.2)
    for i, (name, curve) in enumerate(curves.items()):
        colour, marker = LINES[i % len(LINES)]
        label = f"{name} (height {curve.height:.3g})"
        axes.plot(curve.t, curve.losses, color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
        axes.plot((0, 1), (curve.losses[0], curve.losses[-1]), color=colour, linestyle=":", linewidth=0.8)
    axes.set(title="loss between two models", xlabel="position t on the path", ylabel="loss", xlim=(0, 1))
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_spectrum(flatness: Flatness, path: str | Path) -> None:
    """The density of eigenvalues at every point of the orbit: Euclidean left, invariant right, top ones as ticks.

    Raises ``ValueError`` where densities were not kept, and for a file that is neither .png nor .pdf.
    """
    figure, panels = _figure(2, 1, height=3.6)
    for axes, kind in zip(panels, ("euclidean", "invariant")):
        peak, single = 0.0, math.inf
        for i, point in enumerate(flatness.points):
            spectrum = getattr(point, kind)
            if spectrum.density is None:
                raise ValueError(f"{point.name}: the density was not measured; pass density=True to measure_flatness")
            colour = LINES[i % len(LINES)][0]
            style: dict[str, Any] = {"color": colour, "linewidth": 1.2, "linestyle": ("-", "--", ":", "-.")[i % 4]}
            grid, height = spectrum.density.grid.tolist(), (spectrum.size * spectrum.density.density).tolist()
            axes.plot(grid, height, label=point.name, **style)
            peak, single = max(peak, *height), min(single, 0.4 / spectrum.density.width)  # 0.4: one bump's height
            ticks = [0.97 - 0.05 * i] * len(spectrum.top)
            axes.plot(spectrum.top, ticks, "|", color=colour, markersize=8, transform=axes.get_xaxis_transform())
        axes.set(title=f"{kind} Hessian", xlabel="eigenvalue", yscale="log")
        axes.set_ylim(0.1 * single, 4 * peak)
    panels[0].set_ylabel("eigenvalues per unit, smoothed")
    _legend_below(figure, panels[0])
    _save(figure, path)


def plot_symmetry(symmetry: Symmetry, params: Mapping[str, Any], path: str | Path) -> None:
    """The parameter vector as bars, one for each layer or outer module, its blocks coloured by the group that acts on
    them; layers that look alike are drawn once."""
    from symgeo.models.summary import KINDS, NONE, OTHER, block_kinds

    colours = {kind: colour for (kind, _), colour in zip(KINDS, PALETTE)} | {OTHER: "#bbbbbb", NONE: "#eeeeee"}
    bars = _bars(block_kinds(symmetry.bind(params), params))
    figure, (axes,) = _figure(1, 1, height=1.2 + 0.32 * len(bars))
    for place, (_, pieces) in enumerate(bars):
        left, total = 0.0, sum(size for _, size in pieces)
        for kind, size in pieces:
            axes.barh(place, size / total, left=left, height=0.72, color=colours[kind], edgecolor="white",
                      linewidth=0.4)
            left += size / total
    for kind in dict.fromkeys(kind for _, pieces in bars for kind, _ in pieces):
        axes.barh(0, 0, color=colours[kind], label=kind)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.set(xlim=(0, 1), xlabel="share of the parameters of the layer, in their order")
    axes.invert_yaxis()
    axes.grid(visible=False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def _bars(kinds: Sequence[tuple[str, list[tuple[str, int]]]]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Parameters gathered by layer: (label, blocks); a run of layers with equal blocks is one bar."""
    layers: dict[str, list[tuple[str, int]]] = {}
    for name, pieces in kinds:
        found = re.match(r"(.*?\.\d+)\.", name)
        layers.setdefault(found[1] if found else name.rpartition(".")[0] or name, []).extend(pieces)
    bars: list[tuple[str, list[tuple[str, int]], int]] = []
    for label, blocks in layers.items():
        if bars and bars[-1][1] == blocks and label[-1:].isdigit():
            bars[-1] = (bars[-1][0], blocks, bars[-1][2] + 1)
        else:
            bars.append((label, blocks, 1))
    return [(f"{label} and {n - 1} more" if n > 1 else label, blocks) for label, blocks, n in bars]


def _figure(columns: int, rows: int, height: float, width: float = 8.4) -> tuple[Figure, list[Axes]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(FONT):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)


def _save(figure: Figure, path: str | Path) -> None:
    from matplotlib import rc_context

    with rc_context(FONT), replacing(target(path)) as temporary:
        figure.savefig(temporary)
