"""Sharpness along gauge orbits of attention: S(g w) / S(w) for random g in GL(d_h) between the factors of a head.

Compare figure 7 of "Hide & Seek" (arXiv 2505.05409). Every head gets one random matrix between query and key and
one between value and output, all of one condition number; the network stays the same function. Geodesic sharpness
should not change, adaptive and Euclidean sharpness may. The last curve is a warning: the metric inv with the Gram
matrices relaxed to M + eps I, to first order in rho, which is invariant under orthogonal matrices only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _common import main
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

from symgeo import (
    ParameterManifold,
    SharpnessResult,
    adaptive_sharpness,
    euclidean_sharpness,
    find_symmetry,
    functional_loss,
    geodesic_sharpness,
)
from symgeo.data import digits
from symgeo.demo.orbit import gauge_change
from symgeo.demo.training import Setting
from symgeo.demo.training import train as train_vit
from symgeo.functional import Loss, Params
from symgeo.models.tiny_vit import TinyViT
from symgeo.plots import LOOK, TINY
from symgeo.symmetry import Symmetry

CONDITIONS = (1.0, 3.0, 10.0, 30.0, 100.0)
RHO = 0.1
EPS = 1e-2
RELAXED = f"first-order inv, M + {EPS:g} I"
STYLES: dict[str, dict[str, Any]] = {
    **{name: {"color": color, "marker": marker} for name, (color, marker) in LOOK.items()},
    "geodesic inv taylor2": {"color": "#56B4E9", "marker": "v"},
    RELAXED: {"color": "#D55E00", "marker": "P", "linestyle": "--"},
}
NOTES = [
    "Each matrix is Q1 diag(s) Q2 with s in equal ratios from sqrt(condition) to 1 / sqrt(condition), so that "
    "condition 1 is an orthogonal matrix: it leaves Euclidean sharpness and M + eps I alone, but not adaptive "
    "sharpness.",
    "The geodesic measures are searched in the balanced gauge, which is the same along the orbit up to rounding.",
    "M + eps I is not part of the package: its relaxation is covariant, and equals eps I in the balanced gauge.",
]


@dataclass(frozen=True)
class Model:
    """A trained model, and the outputs that the orbit leaves alone."""

    name: str
    loss: Loss
    params: Params
    batch: Any
    symmetry: Symmetry
    outputs: Callable[[Params], Tensor]


def vit(images: int, training_steps: int, seed: int) -> Model:
    """A tiny vision transformer trained on the digits in float32, measured in float64 on training images."""
    data = digits(seed=seed)
    setting = Setting(lr=5e-3, weight_decay=0.0, init_scale=1.0, batch_size=64, seed=seed)
    params = {name: p.double() for name, p in train_vit(setting, data, training_steps).items()}
    model = TinyViT().double().eval()
    batch = data.train_images[:images].double(), data.train_labels[:images]
    loss, symmetry = functional_loss(model, cross_entropy), find_symmetry(model)

    def logits(at: Params) -> Tensor:
        return torch.func.functional_call(model, at, (batch[0],))

    return Model("tiny vision transformer", loss, params, batch, symmetry, logits)


def bert(sentences: int, training_steps: int, seed: int) -> Model:
    """A BERT of two layers, trained to tell which of three words a sentence of random words has most often."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)  # transformers draws initial values from the global generator
    config: dict[str, Any] = {
        "vocab_size": 3,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
        "num_labels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "eager",
    }
    model = BertForSequenceClassification(BertConfig(**config)).double()
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 3, (8 * sentences, 11), generator=generator)
    labels = torch.nn.functional.one_hot(words, 3).sum(1).argmax(-1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(training_steps):
        chosen = torch.randint(0, len(words), (sentences,), generator=generator)
        optimizer.zero_grad()
        model(input_ids=words[chosen], labels=labels[chosen]).loss.backward()
        optimizer.step()
    model.eval()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = {"input_ids": words[:sentences], "labels": labels[:sentences]}
    loss, symmetry = functional_loss(model), find_symmetry(model)

    def logits(at: Params) -> Tensor:
        return torch.func.functional_call(model, at, (), batch).logits

    return Model("BERT of two layers", loss, params, batch, symmetry, logits)


def measure(model: Model, params: Params, steps: int) -> tuple[dict[str, float], int]:
    """Every sharpness at one point, and how many evaluations of all searches left the domain of their metric."""
    loss, batches = model.loss, [model.batch]
    inv, mix = (ParameterManifold(params, model.symmetry, metric) for metric in ("inv", "mix"))
    results: dict[str, SharpnessResult] = {
        "euclidean": euclidean_sharpness(loss, params, batches, RHO, steps),
        "adaptive": adaptive_sharpness(loss, params, batches, RHO, steps),
        "geodesic inv": geodesic_sharpness(loss, params, batches, inv, RHO, steps),
        "geodesic mix": geodesic_sharpness(loss, params, batches, mix, RHO, steps),
        "geodesic inv taylor2": geodesic_sharpness(loss, params, batches, inv, RHO, steps, geodesic="taylor2"),
    }
    values = {name: result.value for name, result in results.items()}
    left = sum(result.left_domain for result in results.values())
    return values | {RELAXED: relaxed_first_order(model, params, inv)}, left


def relaxed_first_order(model: Model, params: Params, manifold: ParameterManifold) -> float:
    """rho times the norm of the gradient under Tr((M + eps I)^-1 xi^T xi), M each factor's own Gram matrix:

    S = rho sqrt(sum_pairs Tr(e_G (M_G + eps I) e_G^T) + Tr(e_H (M_H + eps I) e_H^T) + sum_i (w_i e_i)^2),
    with e the gradient of the loss.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    value = model.loss(leaves, model.batch)
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    points, slopes = manifold.pack(params), manifold.pack(dict(zip(leaves, gradients)))
    square = (points["rest"] * slopes["rest"]).square().sum()
    for name, pair in manifold.pairs.items():
        rows = [pair.rows, points[name].shape[-2] - pair.rows]
        for factor, slope in zip(points[name].split(rows, dim=-2), slopes[name].split(rows, dim=-2)):
            square = square + (slope @ factor.mT).square().sum() + EPS * slope.square().sum()
    return RHO * float(square.sqrt())


@dataclass(frozen=True)
class Point:
    """One point of the orbit: S(g w) / S(w) by measure, and what else is worth knowing."""

    condition: float
    seed: int
    ratio: dict[str, float]
    output_change: float
    left_domain: int


@dataclass(frozen=True)
class Orbit:
    """The start of an orbit, and its points."""

    start: dict[str, float]
    loss: float
    points: list[Point]

    def largest(self, name: str) -> list[float]:
        """The largest |S(g w) / S(w) - 1| of a measure, by condition number."""
        return [max(abs(p.ratio[name] - 1) for p in self.points if p.condition == c) for c in CONDITIONS]

    def output_change(self) -> list[float]:
        """The largest change of an output relative to the largest output, by condition number."""
        return [max(p.output_change for p in self.points if p.condition == c) for c in CONDITIONS]

    def record(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        keys = [f"{c:g}" for c in CONDITIONS]
        return {
            "max_abs_ratio_minus_1": {name: dict(zip(keys, self.largest(name))) for name in self.start},
            "max_relative_output_change": dict(zip(keys, self.output_change())),
            "loss": self.loss,
            "sharpness_at_start": self.start,
            "points": [vars(point) for point in self.points],
        }


def follow(model: Model, seeds: range, steps: int) -> Orbit:
    """Measure at the trained parameters, and at one random point for each condition number and seed."""
    params, action = model.params, model.symmetry.bind(model.params)
    start, _ = measure(model, params, steps)
    points = []
    with torch.no_grad():
        before = model.outputs(params)
        loss = float(model.loss(params, model.batch))
    for condition in CONDITIONS:
        for seed in seeds:
            moved = action.act(gauge_change(action, condition, torch.Generator().manual_seed(seed)), params)
            values, left = measure(model, moved, steps)
            with torch.no_grad():
                change = float((model.outputs(moved) - before).abs().max() / before.abs().max())
            points.append(Point(condition, seed, {m: v / start[m] for m, v in values.items()}, change, left))
    return Orbit(start, loss, points)


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """One model (small) or two (full), a row of panels for each."""
    examples, training_steps, draws, steps = {"small": (32, 120, 1, 6), "full": (64, 1000, 5, 12)}[size]
    models = [vit(examples, training_steps, seed)]
    notes = list(NOTES)
    if size == "full" and find_spec("transformers"):
        models.append(bert(examples, training_steps // 2, seed))
    elif size == "full":
        notes.append("transformers is not installed, so that BERT is missing.")
    orbits = {model.name: follow(model, range(seed, seed + draws), steps) for model in models}
    settings = {"rho": RHO, "eps": EPS, "examples": examples, "training_steps": training_steps, "steps": steps}
    return _figure(orbits), {
        "parameters": settings | {"conditions": list(CONDITIONS), "points_per_condition": draws},
        "models": {name: orbit.record() for name, orbit in orbits.items()},
        "notes": notes,
    }


def _figure(orbits: dict[str, Orbit]) -> Figure:
    figure, rows = plt.subplots(len(orbits), 2, figsize=(9.2, 3.1 * len(orbits)), squeeze=False, sharex=True)
    for (left, right), (name, orbit) in zip(rows, orbits.items()):
        for measure_name, style in STYLES.items():
            _ratios(left, orbit, measure_name, style)
            changes = np.maximum(orbit.largest(measure_name), TINY)
            right.plot(CONDITIONS, changes, markersize=4, linewidth=1.2, label=measure_name, **style)
        outputs = np.maximum(orbit.output_change(), TINY)
        right.plot(CONDITIONS, outputs, "x:", color="#CC79A7", linewidth=1.2, label="outputs of the network")
        left.axhline(1, color="0.7", linewidth=0.8, zorder=0)
        left.set(xscale="log", yscale="log", ylabel="S(g w) / S(w)", title=f"{name}: ratio")
        right.set(yscale="log", ylim=(1e-17, None), ylabel="largest |S(g w) / S(w) - 1|", title=f"{name}: change")
    for ax in rows[-1]:
        ax.set_xlabel("condition number of the gauge change")
        ax.set_xticks(CONDITIONS, [f"{c:g}" for c in CONDITIONS])
        ax.minorticks_off()
    handles, labels = rows[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def _ratios(ax: Axes, orbit: Orbit, name: str, style: dict[str, Any]) -> None:
    """Every point, and the median of each condition number as a line."""
    middle = [np.median([p.ratio[name] for p in orbit.points if p.condition == c]) for c in CONDITIONS]
    ax.plot(CONDITIONS, middle, color=style["color"], linestyle=style.get("linestyle", "-"), linewidth=1.2)
    conditions, ratios = [p.condition for p in orbit.points], [p.ratio[name] for p in orbit.points]
    ax.scatter(conditions, ratios, color=style["color"], marker=style["marker"], s=14, alpha=0.8, linewidths=0)


if __name__ == "__main__":
    main("orbit", draw, __doc__.splitlines()[0])
