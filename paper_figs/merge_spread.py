"""How far apart the merges of LoRA adapters are, as the adapters move apart, and what they have in common.

Left: adapters scattered around one update of rank 4. To first order in the spread all means agree; two metrics differ
in second order; the truncated SVD of the average and the Fréchet mean of the embedded manifold of fixed rank in third.
Right: adapters that are the sum of a common part of rank 2 and a private one of rank 2, near-orthogonal to all others:
cosines of the merges to the common part, and to the adapters. (Fréchet merging: arXiv 2604.27155; orders derived here.)
"""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _closed_forms import Array
from _common import main
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from manifolds import FixedRank, frechet_mean
from symgeo.merge import merge_factors

ROWS, COLUMNS, RANK, ADAPTERS = 31, 23, 4, 4
SPREADS = {"small": (0.02, 0.08, 0.32), "full": (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)}
AMPLITUDES = {"small": (0.3, 1.0, 2.0), "full": (0.1, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)}
PAIRS = [("tsvd", "bures"), ("tsvd", "geodesic-mix"), ("tsvd", "geodesic-inv"), ("bures", "geodesic-mix")]
PAIRS += [("bures", "geodesic-inv"), ("geodesic-mix", "geodesic-inv"), ("tsvd", "embedded")]
NOTES = [
    "Spread: root mean square of |D_i - mean| over |mean|; difference: |X - Y| / |X|; both medians over the draws.",
    "Slope: of log difference against log spread over the smallest three spreads.",
    "Draws in which a geodesic mean did not exist are not in the medians; 'missing' counts them.",
    "Private parts are of equal Frobenius norm, 'amplitude' times that of the common part. 'bures, lifted' has the sum "
    "of the ranks.",
]

Pair = tuple[Tensor, Tensor]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def dense(pair: Pair) -> Tensor:
    """``B A``."""
    return pair[0] @ pair[1]


def scattered(spread: float, generator: torch.Generator) -> list[Pair]:
    """Factors of one matrix with all singular values in [1, 2], moved at random by about ``spread``."""
    u, v = (torch.linalg.qr(normal(generator, n, RANK)).Q for n in (ROWS, COLUMNS))
    root = torch.linspace(2.0, 1.0, RANK, dtype=torch.float64).sqrt()
    b, a = u * root, (v * root).mT
    noise = [(normal(generator, ROWS, RANK), normal(generator, RANK, COLUMNS)) for _ in range(ADAPTERS)]
    return [tuple(x + spread * x.norm() / z.norm() * z for x, z in zip((b, a), pair)) for pair in noise]


def merged(adapters: list[Pair], method: str, rank: str = "max") -> Tensor | None:
    """A merge as a matrix; ``None`` where the method has none."""
    if method == "embedded":
        stacked = torch.stack([torch.cat([b, a.mT]) for b, a in adapters])
        mean = frechet_mean(FixedRank(RANK, ROWS), stacked)
        return mean.point[:ROWS] @ mean.point[ROWS:].mT if mean.converged else None
    found = merge_factors(adapters, method=method, rank=rank)
    usable = found.report["converged"] and not found.report["fallback"]
    return found.B @ found.A if usable else None


def relative(x: Tensor, y: Tensor) -> float:
    """``|x - y| / |x|``."""
    return float((x - y).norm() / x.norm())


def by_spread(spreads: tuple[float, ...], draws: int, seed: int) -> dict[str, Any]:
    """Medians over draws of the spread and of the difference of each pair of merges, with their slope."""
    generator = torch.Generator().manual_seed(seed)
    measured = []
    rows: dict[str, list[list[float]]] = {f"{x} - {y}": [] for x, y in PAIRS}
    for spread in spreads:
        found: dict[str, list[float]] = {name: [] for name in rows}
        width = []
        for _ in range(draws):
            adapters = scattered(spread, generator)
            matrices = torch.stack([dense(pair) for pair in adapters])
            mean = matrices.mean(0)
            width.append(float((matrices - mean).square().sum((-2, -1)).mean().sqrt() / mean.norm()))
            merges = {name: merged(adapters, name) for name in {name for pair in PAIRS for name in pair}}
            for x, y in PAIRS:
                if merges[x] is not None and merges[y] is not None:
                    found[f"{x} - {y}"].append(relative(merges[x], merges[y]))
        measured.append(float(np.median(width)))
        for name, values in found.items():
            rows[name].append(values)
    return {
        "spread": measured,
        "difference": {name: [_median(values) for values in row] for name, row in rows.items()},
        "missing": {name: [draws - len(values) for values in row] for name, row in rows.items()},
        "slope": {name: _slope(measured, [_median(values) for values in row]) for name, row in rows.items()},
    }


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _slope(x: list[float], y: list[float | None]) -> float | None:
    """Of the line through the first three points in logarithms; none if one of them is missing."""
    first = y[:3]
    return None if None in first else float(np.polyfit(np.log(x[:3]), np.log(np.array(first, dtype=float)), 1)[0])


def shared_and_private(amplitude: float, generator: torch.Generator) -> tuple[list[Pair], Tensor]:
    """Adapters ``C + amplitude P_i`` as factors of rank 4, and ``C``; all parts have rank 2 and norm 1."""

    def part() -> Pair:
        b, a = normal(generator, ROWS, 2), normal(generator, 2, COLUMNS)
        return b / dense((b, a)).norm(), a

    common = part()
    private = [part() for _ in range(ADAPTERS)]
    return [(torch.cat([common[0], amplitude * b], 1), torch.cat([common[1], a])) for b, a in private], dense(common)


MERGES: dict[str, Callable[[list[Pair]], Tensor | None]] = {
    "average": lambda adapters: torch.stack([dense(pair) for pair in adapters]).mean(0),
    "tsvd": lambda adapters: merged(adapters, "tsvd"),
    "bures": lambda adapters: merged(adapters, "bures"),
    "bures, lifted": lambda adapters: merged(adapters, "bures", "sum"),
}


def cosine(x: Tensor, y: Tensor) -> float:
    """``<x, y> / (|x| |y|)``."""
    return float((x * y).sum() / (x.norm() * y.norm()))


def by_amplitude(amplitudes: tuple[float, ...], draws: int, seed: int) -> dict[str, Any]:
    """For each merge and amplitude: mean cosines to the common part and to the adapters, with standard errors."""
    generator = torch.Generator().manual_seed(seed)
    table: dict[str, dict[str, list[dict[str, float | int | None]]]] = {
        name: {"common": [], "adapters": []} for name in MERGES
    }
    for amplitude in amplitudes:
        cosines: dict[str, list[tuple[float, float]]] = {name: [] for name in MERGES}
        for _ in range(draws):
            adapters, common = shared_and_private(amplitude, generator)
            for name, merge in MERGES.items():
                result = merge(adapters)
                if result is not None:
                    inputs = [cosine(result, dense(pair)) for pair in adapters]
                    cosines[name].append((cosine(result, common), float(np.mean(inputs))))
        for name, pairs in cosines.items():
            for k, target in enumerate(("common", "adapters")):
                table[name][target].append(_spread([pair[k] for pair in pairs]))
    return {"amplitude": list(amplitudes), "cosine": table}


def _spread(values: list[float]) -> dict[str, float | int | None]:
    if len(values) < 2:
        return {"mean": None, "standard error": None, "draws": len(values)}
    error = float(np.std(values, ddof=1) / len(values) ** 0.5)
    return {"mean": float(np.mean(values)), "standard error": error, "draws": len(values)}


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """Both panels and their numbers."""
    few, many = {"small": (1, 2), "full": (5, 50)}[size]
    spread, amplitude = by_spread(SPREADS[size], few, seed), by_amplitude(AMPLITUDES[size], many, seed)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8))
    _differences(axes[0], spread)
    for ax, target, of in zip(axes[1:], ("common", "adapters"), ("common part", "adapters, mean")):
        for name, columns in amplitude["cosine"].items():
            means: Array = np.array([cell["mean"] for cell in columns[target]], dtype=float)
            ax.plot(amplitude["amplitude"], means, "o-", markersize=3, label=name)
        ax.set(xlabel="amplitude of the private parts", ylabel=f"cosine to the {of}")
        ax.legend()
    sizes = {"rows": ROWS, "columns": COLUMNS, "rank": RANK, "adapters": ADAPTERS}
    return figure, {
        "parameters": sizes | {"draws": few, "draws_of_amplitudes": many},
        "by_spread": spread,
        "by_amplitude": amplitude,
        "notes": NOTES,
    }


def _differences(ax: Axes, result: dict[str, Any]) -> None:
    for name, values in result["difference"].items():
        slope = result["slope"][name]
        label = name if slope is None else f"{name}: slope {slope:.2f}"
        ax.plot(result["spread"], np.array(values, dtype=float), "o-", markersize=3, label=label)
    ax.set(xscale="log", yscale="log", xlabel="spread of the adapters / their mean", ylabel="relative difference")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(fontsize=7)


if __name__ == "__main__":
    main("merge_spread", draw, __doc__.splitlines()[0])
