"""The five pictures of "The idea in five pictures", drawn with symgeo itself in a few seconds.

    python docs/pictures.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import symgeo
from manifolds import FactorPair
from symgeo import Symmetry, curvature, groups, hessian, merge

GAUGE = Symmetry({"u": "(h e)", "v": "(h e*)"}, {"e": groups.GeneralLinear(per="h")}, sizes={"e": 1})
EUCLIDEAN, QUOTIENT = "#c44e52", "#2b6cb0"
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "svg.hashsalt": "symgeo", "figure.facecolor": "white",
}


def scalar_loss(params: symgeo.functional.Params, target: float) -> Tensor:
    """The loss of f(x) = u v x: (u v - target)^2."""
    return (params["u"] * params["v"] - target).square().sum()


def pair(u: float, v: float) -> symgeo.functional.Params:
    """The two parameters of that net."""
    return {"u": torch.tensor([u], dtype=torch.float64), "v": torch.tensor([v], dtype=torch.float64)}


def orbit() -> Figure:
    """One net, many parameters: the loss of u v x, and the orbit of one net under random elements of its group."""
    figure, axes = plt.subplots(figsize=(4.6, 3.9), layout="constrained")
    axis = np.linspace(0.05, 4, 100)
    u, v = np.meshgrid(axis, axis)
    shown = axes.contourf(u, v, np.log10((u * v - 1) ** 2 + 1e-4), 20, cmap="Greys_r")
    figure.colorbar(shown, label="log₁₀ loss", ticks=[-4, -2, 0, 2])
    net = pair(1.5, 1.2)
    action = GAUGE.bind(net)
    generator = torch.Generator().manual_seed(3)
    points = [net]
    while len(points) < 9:
        moved = action.act(action.random(generator), net)
        if 0.1 < float(moved["u"]) < 3.9 and 0.1 < float(moved["v"]) < 3.9:
            points.append(moved)
    axes.plot(axis, 1.8 / axis, color=QUOTIENT, linewidth=1)
    places = [[float(p[name]) for p in points] for name in ("u", "v")]
    axes.plot(*places, "o", color=QUOTIENT, label="one function")
    axes.set(xlim=(0.05, 4), ylim=(0.05, 4), xlabel="u", ylabel="v", title="f(x) = u v x")
    axes.legend(loc="upper right")
    return figure


def level_sets(stacked: bool = False) -> Figure:
    """How steep the loss is: level sets of the gradient norm, in the Euclidean metric and on the quotient."""
    axis = torch.linspace(0.05, 2.5, 81, dtype=torch.float64)
    u, v = torch.meshgrid(axis, axis, indexing="xy")
    x = torch.stack([u, v], -1).reshape(-1, 2, 1).requires_grad_()
    (gradient,) = torch.autograd.grad((x[:, 0] * x[:, 1] - 1).square().sum(), x)
    manifold, x = FactorPair(rows=1, metric="inv"), x.detach()
    norms = {
        "Euclidean gradient norm": gradient.flatten(1).norm(dim=1),
        "quotient gradient norm": manifold.norm(x, manifold.egrad2rgrad(x, gradient)),
    }
    rows, columns, size = (2, 1, (3.6, 6.8)) if stacked else (1, 2, (7.4, 3.6))
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=stacked, sharey=True, layout="constrained")
    for ax, (title, norm) in zip(axes, norms.items()):
        values = norm.reshape(u.shape).numpy()
        shades = plt.get_cmap("GnBu")(np.linspace(0, 1, 10))
        ax.contourf(axis, axis, values, np.quantile(values, np.linspace(0, 1, 11)), colors=shades)
        for p in (0.25, 0.5, 1.0, 2.0):
            ax.plot(axis, p / axis, "--", color=EUCLIDEAN, linewidth=1.8 if p == 1 else 0.9)
        ax.set(xlim=(0.05, 2.5), ylim=(0.05, 2.5), xlabel="u", ylabel="v", title=title)
        ax.label_outer()
    return figure


def average() -> Figure:
    """One adapter written in two gauges: the update, the average of the factors, the mean on the quotient."""
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(14, 2, generator=generator, dtype=torch.float64)
    a = torch.randn(2, 18, generator=generator, dtype=torch.float64)
    gauge = torch.tensor([[0.3, -1.4], [1.1, 0.4]], dtype=torch.float64)
    copies = [(b, a), (b @ torch.linalg.inv(gauge), gauge @ a)]
    mean = merge.merge_factors(copies, method="bures")
    panels = {
        "the update B A of both copies": b @ a,
        "average of the factors": sum(x for x, _ in copies) @ sum(y for _, y in copies) / 4,
        "mean on the quotient": mean.B @ mean.A,
    }
    figure, axes = plt.subplots(1, 3, figsize=(8, 2.6), layout="constrained")
    limit = float((b @ a).abs().max())
    for ax, (title, delta) in zip(axes, panels.items()):
        error = float((delta - b @ a).norm() / (b @ a).norm())
        ax.imshow(delta, cmap="RdBu", vmin=-limit, vmax=limit)
        ax.set(xticks=[], yticks=[], title=title)
        ax.set_xlabel("" if ax is axes[0] else f"relative error {error:.2g}" if error > 1e-9 else "error: rounding")
    return figure


class Head(torch.nn.Module):
    """One attention head, whose query and key matrices have the symmetry GL(3), as have those of value and output."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        draw = lambda *shape: torch.nn.Parameter(0.6 * torch.randn(*shape, generator=generator, dtype=torch.float64))  # noqa: E731
        self.query, self.key, self.value, self.output = draw(3, 5), draw(3, 5), draw(3, 5), draw(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = (x @ self.query.T) @ (x @ self.key.T).mT
        return scores.softmax(-1) @ (x @ self.value.T) @ self.output.T


HEAD = Symmetry(
    {"query": "e* _", "key": "e _", "value": "f _", "output": "_ f*"},
    {"e": groups.GeneralLinear(), "f": groups.GeneralLinear()},
)


def spectra() -> Figure:
    """The eight largest eigenvalues of two Hessians at equivalent parameters of one attention head."""
    generator = torch.Generator().manual_seed(0)
    net = Head(generator)
    batches = [(torch.randn(8, 6, 5, generator=generator, dtype=torch.float64),
                torch.randn(8, 6, 5, generator=generator, dtype=torch.float64))]
    params = {name: p.detach() for name, p in net.named_parameters()}
    loss, action = symgeo.functional_loss(net, torch.nn.functional.mse_loss), HEAD.bind(params)
    conditions = np.geomspace(1, 30, 6)
    rows: dict[str, list[Tensor]] = {"Euclidean Hessian": [], "Hessian on the quotient": []}
    for condition in conditions:
        stretch = torch.diag(torch.tensor([condition**0.5, 1.0, condition**-0.5], dtype=torch.float64))
        moved = action.act(symgeo.Element({"e": stretch, "f": stretch}), params)
        manifold = symgeo.ParameterManifold(moved, HEAD, metric="inv", rest="euclidean")
        operators = (hessian.euclidean_hessian(loss, moved, batches, check=False),
                     hessian.riemannian_hessian(loss, moved, batches, manifold, check=False))
        for found, operator in zip(rows.values(), operators):
            found.append(operator.eigvalsh()[-8:])
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.3), layout="constrained")
    for ax, (title, values), color in zip(axes, rows.items(), (EUCLIDEAN, QUOTIENT)):
        ax.plot(conditions, torch.stack(values), ".-", color=color, linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="condition number of the gauge", title=title)
    axes[0].set_ylabel("eight largest eigenvalues")
    return figure


def blocks() -> Figure:
    """One gradient of a small net: its outer product, the average over the orbit, and the two blocks that are kept."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"0.weight": (4, 2), "0.bias": (4,), "2.weight": (1, 4)}
    gradient = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    units = Symmetry({"0.weight": "h _", "0.bias": "h", "2.weight": "_ h"}, {"h": groups.Permutation()})
    kept = curvature.orbit_average(units, gradient)
    order = torch.tensor([4 * 0 + 2 * i + j for j in range(2) for i in range(4)] + list(range(8, 16)))
    flat = torch.cat([g.flatten() for g in gradient.values()])
    single, dense = torch.outer(flat, flat)[order][:, order], kept.dense()[order][:, order]
    small = [block.to_dense().matrix.reshape(4, 4) for block in kept.blocks]
    joined = torch.full((4, 9), torch.nan, dtype=torch.float64)
    joined[:, :4], joined[:, 5:] = small[0], small[1]
    figure, axes = plt.subplots(1, 3, figsize=(8, 2.9), layout="constrained", width_ratios=(1, 1, 1.1))
    titles = ("g gᵀ of one gradient: 16 × 16", "averaged over 24 permutations", "what is kept: two 4 × 4 blocks")
    for ax, title, matrix in zip(axes, titles, (single, dense, joined)):
        _heat(ax, matrix, title)
    return figure


def _heat(ax: Axes, matrix: Tensor, title: str) -> None:
    limit = float(matrix[~matrix.isnan()].abs().max())
    ax.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit)
    ax.set(xticks=[], yticks=[], title=title)
    ax.spines[:].set_visible(False)


PICTURES: dict[str, Callable[[], Figure]] = {
    "orbit": orbit, "level_sets": level_sets, "level_sets_stacked": lambda: level_sets(stacked=True),
    "average": average, "spectra": spectra, "blocks": blocks,
}


def draw_all(folder: Path) -> None:
    """All pictures as SVG; one that is newer than this file and the package stays."""
    folder.mkdir(parents=True, exist_ok=True)
    package = Path(symgeo.__file__).parent
    sources = max(file.stat().st_mtime for file in (Path(__file__), *package.rglob("*.py")))
    for name, draw in PICTURES.items():
        file = folder / f"{name}.svg"
        if not file.exists() or file.stat().st_mtime < sources:
            with matplotlib.rc_context(STYLE):
                figure = draw()
                figure.savefig(file, metadata={"Date": None})
                plt.close(figure)


if __name__ == "__main__":
    draw_all(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/_pictures"))
