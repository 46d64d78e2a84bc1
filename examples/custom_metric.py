"""
A metric of your own for the Hessian
====================================

The eigenvalues of a Hessian depend on the coordinates: store the weights through another function, and the same
network is flatter or sharper. With a metric that is carried along they do not. Here a metric is a function of the
parameters that returns a matrix. Three are tried on a small network and on its twin with weights ``w = sinh(psi)``,
at a point that is not critical: no metric, Fisher, and one of our own, the change of the outputs on reference inputs.
Two ways to spoil it are shown as well: the connection left out, and the metric not carried along.

::

    python examples/custom_metric.py [--size small|full] [--out DIR]
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from _run import options, save
from matplotlib.figure import Figure
from torch import Tensor, nn

from symgeo.hessian import (
    HessianOperator,
    ModelLoss,
    Reparametrization,
    euclidean_hessian,
    fisher_metric,
    invariant_hessian,
    model_loss,
    pullback_metric,
)

Params = dict[str, Tensor]

# %%
# Other coordinates
# -----------------
# A pair of functions, each the other's inverse. ``push`` carries parameters, ``loss`` and ``metric`` carry those.

SINH = Reparametrization(
    forward=lambda params: {name: w.asinh() for name, w in params.items()},
    inverse=lambda params: {name: psi.sinh() for name, psi in params.items()},
)

# %%
# Metrics
# -------
# A function of the parameters that returns a ``(d, d)`` matrix, or a ``(d,)`` diagonal, in flat order. The Fisher
# metric exists; ``pullback_metric`` makes the metric whose lengths are those of any function's values, such as the
# outputs on inputs that matter. A multiple of the identity makes both of them positive.


class Metrics:
    """The metrics of one network."""

    def __init__(self, model: nn.Module, loss: ModelLoss, batch: tuple[Tensor, Tensor], reference: Tensor) -> None:
        self.model, self.reference = model, reference
        self._fisher = fisher_metric(loss, [batch])
        self._lengths = pullback_metric(self.outputs)

    def outputs(self, params: Params) -> Tensor:
        """On the reference inputs, scaled such that squares are means over them."""
        return torch.func.functional_call(self.model, params, (self.reference,)) / len(self.reference) ** 0.5

    def fisher(self, params: Params) -> Tensor:
        """What the loss calls a distance between outputs, on the training inputs."""
        return damped(self._fisher(params))

    def reference_outputs(self, params: Params) -> Tensor:
        """The mean square change of the outputs on the reference inputs."""
        return damped(self._lengths(params))


def damped(g: Tensor) -> Tensor:
    """With a tenth of the identity."""
    return g + 0.1 * torch.eye(len(g), dtype=g.dtype)


# %%
# The same point twice
# --------------------
# Each row holds an operator in the weights and one in the new coordinates. What is invariant has equal eigenvalues.


def pairs(model: nn.Module, batch: tuple[Tensor, Tensor], reference: Tensor) -> dict[str, tuple[HessianOperator, ...]]:
    """Operators at the weights, and at the same network's new coordinates."""
    loss = model_loss(model, "mse")
    params = {name: p.detach() for name, p in model.named_parameters()}
    there, moved, data = SINH.push(params), SINH.loss(loss), [batch]
    metrics = Metrics(model, loss, batch, reference)

    def both(metric: Any, carried: Any, **settings: Any) -> tuple[HessianOperator, ...]:
        return (invariant_hessian(loss, params, data, metric, **settings),
                invariant_hessian(moved, there, data, carried, **settings))

    fisher, own = SINH.metric(metrics.fisher), SINH.metric(metrics.reference_outputs)
    return {
        "no metric": (euclidean_hessian(loss, params, data), euclidean_hessian(moved, there, data)),
        "Fisher": both(metrics.fisher, fisher),
        "outputs on reference inputs": both(metrics.reference_outputs, own),
        "Fisher, no connection": both(metrics.fisher, fisher, connection=False),
        "diagonal 1 / w^2, not carried": both(inverse_squares, inverse_squares),
    }


def inverse_squares(params: Params) -> Tensor:
    """A diagonal, by the same formula in any coordinates, which makes it another metric in each of them."""
    return torch.cat([1 / (x.flatten() ** 2 + 0.01) for x in params.values()])


def network(width: int, steps: int) -> tuple[nn.Module, tuple[Tensor, Tensor], Tensor]:
    """In float64, half trained; its data; reference inputs further out than the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()
    x = torch.randn(64, 3, dtype=torch.float64)
    batch = x, torch.stack([(x[:, 0] * x[:, 1]).sin(), x[:, 2].abs()], dim=-1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return model, batch, 2 * torch.randn(48, 3, dtype=torch.float64)


def draw(spectra: dict[str, list[list[float]]]) -> Figure:
    """All eigenvalues in both coordinates, one panel for each metric."""
    figure, panels = plt.subplots(1, len(spectra), figsize=(2.6 * len(spectra), 2.9), layout="constrained")
    for axes, (name, (before, after)) in zip(panels, spectra.items()):
        axes.plot(before, "o", markersize=6, markerfacecolor="none", label="coordinates w")
        axes.plot(after, "x", markersize=5, label="w = sinh(psi)")
        axes.set_yscale("symlog", linthresh=1e-2)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("eigenvalue number")
    panels[0].set_ylabel("eigenvalue")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def main() -> None:
    """Measures, prints and plots."""
    chosen = options(__doc__)
    model, batch, reference = network(*{"small": (5, 60), "full": (11, 200)}[chosen.size])
    rows, spectra = [], {}
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    print(f"{'metric':32}{'largest in w':>15}{'largest in psi':>16}{'change of all':>15}")
    for name, operators in pairs(model, batch, reference).items():
        before, after = (operator.eigvalsh() for operator in operators)
        change = float((after - before).norm() / before.norm())
        rows.append({"metric": name, "largest": [float(before[-1]), float(after[-1])], "change": change})
        spectra[name] = [before.tolist(), after.tolist()]
        print(f"{name:32}{float(before[-1]):15.9f}{float(after[-1]):16.9f}{change:15.1e}")
    save(chosen.out, "custom_metric", {"rows": rows, "spectra": spectra}, draw(spectra))


if __name__ == "__main__":
    main()
