"""
Optimize on a quotient
======================

A matrix of low rank is completed from half of its entries, as a product G H^T of two factors. Each product has many
pairs of factors, ``(G A^-1, H A^T)`` for any invertible A, and gradient descent takes another path from each of them:
the worse conditioned A, the slower. On the quotient there is one path. ``manifolds.FactorPair`` is a geoopt manifold,
and geoopt's optimizers work on it as they are.

::

    python examples/optimize_on_a_quotient.py [--size small|full] [--out DIR]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import geoopt
import matplotlib.pyplot as plt
import torch
from _run import options, save
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer

from manifolds import FactorPair

CONDITIONS = (1.0, 10.0, 100.0)
Build = Callable[[nn.Parameter, float], Optimizer]

# %%
# The problem
# -----------
# A point is both factors stacked, ``[G; H]`` of shape ``(n + m, r)``.


@dataclass(frozen=True)
class Completion:
    """Half of the entries of an n x m matrix of rank r, and how long to look for the others."""

    n: int
    m: int
    r: int
    steps: int
    target: Tensor
    seen: Tensor
    start: Tensor

    @classmethod
    def random(cls, n: int, m: int, r: int, steps: int) -> Completion:
        """From a seed; the start has equal Gram matrices."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        seen = torch.rand(n, m, generator=generator) < 0.5
        start = FactorPair(n).projx(torch.cat([normal(n, r), normal(m, r)]))
        return cls(n, m, r, steps, normal(n, r) @ normal(r, m), seen, start)

    def gap(self, point: Tensor) -> Tensor:
        """The product less the target."""
        return point[: self.n] @ point[self.n :].mT - self.target

    def loss(self, point: Tensor) -> Tensor:
        """Half the square of the gap, estimated from the entries that are seen."""
        return 0.5 * self.gap(point)[self.seen].square().mean() * self.n * self.m

    def regauged(self, condition: float) -> Tensor:
        """The same start in a gauge A of this condition number."""
        generator = torch.Generator().manual_seed(1)
        u, _, vh = torch.linalg.svd(torch.randn(self.r, self.r, generator=generator, dtype=torch.float64))
        stretch = torch.logspace(0, 1, self.r, condition, dtype=torch.float64) / condition**0.5
        return FactorPair(self.n).act(self.start, (u * stretch) @ vh)


# %%
# Optimizers
# ----------
# On the quotient the parameter is a ``geoopt.ManifoldParameter``; everything else is the same.

METHODS: dict[str, tuple[Build, tuple[float, ...]]] = {
    "SGD of torch": (lambda p, lr: torch.optim.SGD([p], lr), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "Adam of torch": (lambda p, lr: torch.optim.Adam([p], lr), (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    "Riemannian SGD of geoopt": (lambda p, lr: geoopt.optim.RiemannianSGD([p], lr), (0.2, 0.6)),
    "Riemannian Adam of geoopt": (lambda p, lr: geoopt.optim.RiemannianAdam([p], lr), (3.0, 10.0)),
}
ON_QUOTIENT = [name for name in METHODS if name.startswith("Riemannian")]


def descend(problem: Completion, start: Tensor, build: Build, lr: float, quotient: bool) -> list[float]:
    """The losses before every step and after the last."""
    p = nn.Parameter(start.clone())
    if quotient:
        p = geoopt.ManifoldParameter(start.clone(), manifold=FactorPair(problem.n, metric="mix"))
    optimizer, losses = build(p, lr), []
    for _ in range(problem.steps):
        optimizer.zero_grad()
        loss = problem.loss(p)
        if not loss.isfinite():
            break
        loss.backward()
        losses.append(float(loss.detach()))
        try:
            optimizer.step()
        except (ValueError, torch.linalg.LinAlgError):  # too far: the point has entries that are not finite
            return [*losses, math.inf]
    return [*losses, float(problem.loss(p.detach()))]


# %%
# The comparison
# --------------
# Torch's optimizers are given the best of several learning rates in each gauge. Geoopt's get the one that is best in
# the balanced gauge: it serves for all of them.


def compare(problem: Completion, name: str) -> list[dict[str, Any]]:
    """One row for each gauge."""
    (build, every), quotient = METHODS[name], name in ON_QUOTIENT
    rows: list[dict[str, Any]] = []
    for condition in CONDITIONS:
        rates = (rows[0]["rate"],) if quotient and rows else every
        runs = {lr: descend(problem, problem.regauged(condition), build, lr, quotient) for lr in rates}
        best = min(runs, key=lambda lr: runs[lr][-1] if math.isfinite(runs[lr][-1]) else math.inf)
        rows.append({"method": name, "condition": condition, "rate": best, "losses": runs[best]})
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Loss against steps, one panel for each method, one line for each gauge."""
    figure, panels = plt.subplots(1, len(METHODS), figsize=(11, 3), sharey=True, layout="constrained")
    for axes, name in zip(panels, METHODS):
        for k, row in enumerate(r for r in rows if r["method"] == name):
            style = {"linestyle": ("-", "--", ":")[k], "linewidth": (3.0, 2.0, 1.4)[k], "color": f"C{k}"}
            axes.plot(row["losses"], label=f"condition {row['condition']:g}", **style)
        axes.set(title=name, xlabel="step", yscale="log")
        axes.title.set_fontsize(9)
    panels[0].set_ylabel("loss")
    panels[-1].legend(frameon=False, fontsize=8, title="gauge of the start", title_fontsize=8)
    return figure


def main() -> None:
    """Optimizes, prints and plots."""
    chosen = options(__doc__)
    problem = Completion.random(*{"small": (19, 17, 3, 30), "full": (60, 50, 5, 300)}[chosen.size])
    print(f"{problem.n} x {problem.m}, rank {problem.r}, {int(problem.seen.sum())} entries seen, {problem.steps} steps")
    print(f"{'loss at the end from a gauge of condition':42}{''.join(f'{c:>12g}' for c in CONDITIONS)}{'spread':>12}")
    rows: list[dict[str, Any]] = []
    for name in METHODS:
        found = compare(problem, name)
        ends = [row["losses"][-1] for row in found]
        print(f"{name:42}{''.join(f'{end:12.3e}' for end in ends)}{(max(ends) - min(ends)) / min(ends):12.0e}")
        rows += found
    save(chosen.out, "optimize_on_a_quotient", rows, draw(rows))


if __name__ == "__main__":
    main()
