"""Eigenvalues and traces of Hessians before and after reparametrization, and along an orbit: Euclidean, covariant.

Left: a net of 31 parameters in other coordinates, at a critical point and at a random one. A metric G goes along as a
metric does. Compare "The Geometry of Neural Nets' Parameter Spaces Under Reparametrization" (arXiv 2302.07384): at a
critical point the spectrum of G^-1 H stays; elsewhere only that of the covariant Hessian G^-1 (d2L - Gamma dL) does.
Middle and right: a trained vision transformer along gauge orbits of attention, by condition number.
"""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _common import main
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from symgeo import ParameterManifold, find_symmetry, functional_loss
from symgeo.data import digits
from symgeo.demo.orbit import gauge_change
from symgeo.functional import Loss, Params
from symgeo.hessian import (
    HessianOperator,
    Reparametrization,
    euclidean_hessian,
    fisher_metric,
    invariant_hessian,
    model_loss,
    pullback_metric,
    riemannian_hessian,
)
from symgeo.models.tiny_vit import TinyViT
from symgeo.plots import TINY

CONDITIONS = (1.0, 3.0, 10.0, 30.0, 100.0)
DAMPING = 0.1
DECAY = 0.01
OFFSET = 5.0
OPERATORS = {"Euclidean H": "#555555", "G^-1 H": "#E69F00", "covariant": "#0072B2"}
ORBIT = {"Euclidean": ("#555555", "s"), "covariant, inv": ("#0072B2", "o"), "covariant, mix": ("#009E73", "D")}
NOTES = [
    f"Loss: squared error plus {DECAY} |theta|^2 / 2, which makes the critical point isolated. G is the Gauss-Newton "
    f"matrix plus {DAMPING} I, which is not constant.",
    "sinh: psi = sinh(theta); softplus: theta + 5 = softplus(psi); log: psi = log(theta + 5).",
    "Weight normalisation, theta = s v / |v| per row of the weights, is no bijection: psi has a number more per row "
    "than theta, the pulled-back metric is singular, and the pseudo-inverse takes the place of the inverse. The "
    "eigenvalues compared are the 31 on its range, for the Euclidean Hessian the 31 largest.",
    "Changes are the largest of any eigenvalue, relative to the largest one; 'trace' is that of the trace.",
    "The orbit moves every head by one random matrix of the condition number between query and key, and one between "
    "value and output; the transformer is not at a critical point. There, covariant is the covariant Hessian on the "
    "quotient.",
]


def softplus_inverse(x: Tensor) -> Tensor:
    """log(e^x - 1)."""
    return x + torch.log(-torch.expm1(-x))


def each(function: Callable[[Tensor], Tensor]) -> Callable[[Params], Params]:
    """Elementwise on all parameters."""
    return lambda params: {name: function(p) for name, p in params.items()}


MAPS = {
    "sinh": Reparametrization(each(torch.sinh), each(torch.asinh)),
    "softplus": Reparametrization(each(lambda t: softplus_inverse(t + OFFSET)), each(lambda s: softplus(s) - OFFSET)),
    "log": Reparametrization(each(lambda t: torch.log(t + OFFSET)), each(lambda s: s.exp() - OFFSET)),
}


def unnormalised(params: Params) -> Params:
    """Weight normalisation: the weights ``s v / |v|`` of directions ``v`` and scales ``s``, one per row."""
    found = {}
    for name, p in params.items():
        if name.endswith(".v"):
            key = name.removesuffix(".v")
            found[key] = params[f"{key}.s"].unsqueeze(1) * p / p.norm(dim=1, keepdim=True)
        elif not name.endswith(".s"):
            found[name] = p
    return found


def normalised(params: Params, seed: int) -> Params:
    """Scales and directions of these weights, directions of random lengths."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, p in params.items():
        if p.ndim == 2:
            lengths = 0.5 + torch.rand(len(p), 1, generator=generator, dtype=p.dtype)
            norms = p.norm(dim=1, keepdim=True)
            found |= {f"{name}.v": lengths * p / norms, f"{name}.s": norms.squeeze(1)}
        else:
            found[name] = p
    return found


class Problem:
    """A net 3-4-3 on random data, its metric, and its critical and random points."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        split, rows = model_loss(net, "mse"), 17
        self.batch = (torch.randn(rows, 3, generator=generator, dtype=torch.float64),
                      torch.randn(rows, 3, generator=generator, dtype=torch.float64))
        metric = fisher_metric(split, [self.batch])
        size = sum(p.numel() for p in net.parameters())
        self.metric = lambda params: metric(params) + DAMPING * torch.eye(size, dtype=torch.float64)

        def loss(params: Params, batch: Any) -> Tensor:
            return split(params, batch) + 0.5 * DECAY * sum(p.square().sum() for p in params.values())

        self.loss: Loss = loss
        start = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
                 for name, p in net.named_parameters()}
        self.points = {"critical": self._minimum(start), "random": start}

    def _minimum(self, start: Params) -> Params:
        leaves = {name: p.clone().requires_grad_() for name, p in start.items()}
        optimizer = torch.optim.LBFGS(leaves.values(), max_iter=5000, tolerance_grad=1e-11, tolerance_change=0.0,
                                      history_size=40, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = self.loss(leaves, self.batch)
            value.backward()
            return value

        optimizer.step(closure)
        return {name: p.detach() for name, p in leaves.items()}

    def gradient(self, params: Params) -> float:
        """Its norm."""
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        slopes = torch.autograd.grad(self.loss(leaves, self.batch), list(leaves.values()))
        return float(torch.cat([g.flatten() for g in slopes]).norm())

    def views(self, params: Params, seed: int) -> dict[str, tuple[Loss, Params, Any]]:
        """Loss, parameters and metric in all coordinates, the original ones first."""
        found: dict[str, tuple[Loss, Params, Any]] = {"theta": (self.loss, params, self.metric)}
        for name, change in MAPS.items():
            found[name] = change.loss(self.loss), change.push(params), change.metric(self.metric)
        moved = lambda new, batch: self.loss(unnormalised(new), batch)  # noqa: E731
        found["weight norm"] = moved, normalised(params, seed), pullback_metric(unnormalised, self.metric)
        return found


def spectra(problem: Problem, seed: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Eigenvalues by point, coordinates, operator."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for at, params in problem.points.items():
        found[at] = {}
        for name, (loss, place, metric) in problem.views(params, seed).items():
            data, pinv = [problem.batch], name == "weight norm"
            operators = {
                "Euclidean H": euclidean_hessian(loss, place, data),
                "G^-1 H": invariant_hessian(loss, place, data, metric, connection=False, pinv=pinv),
                "covariant": invariant_hessian(loss, place, data, metric, pinv=pinv),
            }
            size = operators["covariant"].shape[0]
            found[at][name] = {kind: op.eigvalsh()[-size:].tolist() for kind, op in operators.items()}
    return found


def change(found: list[float], start: list[float]) -> dict[str, float]:
    """How much eigenvalues and their sum changed, relative to the largest eigenvalue and to the sum."""
    a, b = np.array(found), np.array(start)
    return {"eigenvalues": float(np.abs(a - b).max() / np.abs(b).max()), "trace": float(abs(a.sum() / b.sum() - 1))}


def vit(size: str, seed: int) -> tuple[Loss, Params, Any, TinyViT]:
    """A vision transformer of a thousand parameters (a few hundred when small), trained on some digits."""
    images, steps, width, hidden = {"small": (50, 150, 4, 5), "full": (200, 800, 8, 11)}[size]
    data = digits(train=images, seed=seed)
    model = TinyViT(patch_size=4, width=width, depth=1, heads=2, mlp_width=hidden,
                    generator=torch.Generator().manual_seed(seed)).double()
    batch = data.train_images.double(), data.train_labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    return functional_loss(model, cross_entropy), params, batch, model


def orbit(size: str, seed: int) -> dict[str, Any]:
    """Top eigenvalue and trace at the start and at points of the orbit, by kind."""
    loss, params, batch, model = vit(size, seed)
    symmetry = find_symmetry(model)
    action = symmetry.bind(params)

    def measure(at: Params) -> dict[str, list[float]]:
        operators: dict[str, HessianOperator] = {"Euclidean": euclidean_hessian(loss, at, [batch])}
        for metric in ("inv", "mix"):
            manifold = ParameterManifold(at, symmetry, metric)
            operators[f"covariant, {metric}"] = riemannian_hessian(loss, at, [batch], manifold)
        values = {kind: op.eigvalsh() for kind, op in operators.items()}
        return {kind: [*reversed(v[-3:].tolist()), float(v.sum())] for kind, v in values.items()}

    points = [measure(action.act(gauge_change(action, c, torch.Generator().manual_seed(seed)), params))
              for c in CONDITIONS]
    return {"parameters": sum(p.numel() for p in params.values()), "conditions": list(CONDITIONS),
            "start": measure(params), "points": points}


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """Changes in other coordinates; top eigenvalues, and changes, along an orbit."""
    problem = Problem(seed)
    found, along = spectra(problem, seed), orbit(size, seed)
    changes = {
        at: {name: {kind: change(values, views["theta"][kind]) for kind, values in kinds.items()}
             for name, kinds in views.items() if name != "theta"}
        for at, views in found.items()
    }
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 3.8))
    _bars(left, changes)
    _orbit(middle, right, along)
    gradients = {at: problem.gradient(params) for at, params in problem.points.items()}
    return figure, {"changes": changes, "gradient": gradients, "spectra": found, "orbit": along, "notes": NOTES}


def _bars(ax: Axes, changes: dict[str, Any]) -> None:
    rows = [(at, name) for at in changes for name in changes[at]]
    for i, (kind, colour) in enumerate(OPERATORS.items()):
        heights = [max(changes[at][name][kind]["eigenvalues"], TINY) for at, name in rows]
        ax.plot(heights, np.arange(len(rows)) + 0.18 * (i - 1), "sDo"[i], color=colour, markersize=6, label=kind)
    ax.set_yticks(range(len(rows)), [f"{name}, {at}" for at, name in rows])
    ax.invert_yaxis()
    ax.grid(axis="y", color="0.9")
    ax.set(xscale="log", xlabel="largest relative change of an eigenvalue")
    ax.set_title("other coordinates", pad=18)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=3, fontsize=7)


def _orbit(middle: Axes, right: Axes, along: dict[str, Any]) -> None:
    for kind, (colour, marker) in ORBIT.items():
        start = along["start"][kind]
        ratios = [p[kind][0] / start[0] for p in along["points"]]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.2}
        middle.plot(CONDITIONS, ratios, label=f"{kind}: largest eigenvalue", **style)
        traces = [p[kind][3] / start[3] for p in along["points"]]
        middle.plot(CONDITIONS, traces, linestyle=":", label=f"{kind}: trace", **style | {"markerfacecolor": "none"})
        largest = [max(abs(x / y - 1) for x, y in zip(p[kind], start)) for p in along["points"]]
        right.plot(CONDITIONS, np.maximum(largest, TINY), label=kind, **style)
    middle.set(xscale="log", yscale="log", ylabel="relative to the trained parameters", title="along a gauge orbit")
    right.set(xscale="log", yscale="log", ylabel="largest relative change", title="the same, as change")
    middle.legend(fontsize=7)
    right.legend(fontsize=7)
    for ax in (middle, right):
        ax.set_xlabel("condition number of the gauge change")
        ax.set_xticks(CONDITIONS, [f"{c:g}" for c in CONDITIONS])
        ax.minorticks_off()


if __name__ == "__main__":
    main("invariant_eigenvalues", draw, __doc__.splitlines()[0])
