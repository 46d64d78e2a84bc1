"""
Sharpness of a transformer
==========================

A BERT from a small config learns to tell whether a sequence holds more tokens of the upper half of the vocabulary, from
labels of which one in ten is wrong. Then, at the trained weights and at equivalent points of the same GL orbit:

1. find the symmetry of the model, verified by random elements;
2. measure geodesic sharpness (exact geodesics, metric inv) and adaptive sharpness;
3. see that the function and the geodesic sharpness stand still while the adaptive sharpness moves.

::

    python examples/sharpness_of_a_transformer.py [--size small|full] [--out DIR]
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import matplotlib.pyplot as plt
import torch
from _run import options, save
from _tiny_bert import make_batch, tiny_bert
from matplotlib.figure import Figure
from torch import Tensor, nn

import symgeo

Params = dict[str, Tensor]

# %%
# A trained model
# ---------------


def train(steps: int, generator: torch.Generator) -> nn.Module:
    """A two-layer BERT, in float64."""
    torch.manual_seed(0)
    model = tiny_bert().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**make_batch(64, generator)).loss.backward()
        optimizer.step()
    return model.eval()


# %%
# Points of its orbit
# -------------------
# One Gaussian matrix for every head: other parameters of the same function.


def orbit(symmetry: symgeo.Symmetry, params: Params, generator: torch.Generator) -> dict[str, Params]:
    """The trained parameters and three others."""
    action = symmetry.bind(params)
    pairs = [name for name, group in action.groups.items() if isinstance(group, symgeo.groups.GeneralLinear)]
    points = {"trained": params}
    for k in range(3):
        shapes = {name: (*action.copies[name], action.sizes[name], action.sizes[name]) for name in pairs}
        draws = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        points[f"orbit {k + 1}"] = action.act(action.element(draws), params)
    return points


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Both kinds of sharpness relative to the trained point."""
    figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    for kind, marker in (("geodesic", "o"), ("adaptive", "s")):
        names, ratios = [row["point"] for row in rows], [row[kind] / rows[0][kind] for row in rows]
        axes.plot(names, ratios, marker=marker, label=kind)
    axes.set(ylabel="sharpness / sharpness of the trained point", title="Four points, one function", yscale="log")
    axes.legend(frameon=False)
    return figure


# %%
# The measurement
# ---------------


def main() -> None:
    """Trains, measures, prints and plots."""
    chosen = options(__doc__)
    training, count, steps = {"small": (60, 1, 8), "full": (400, 4, 20)}[chosen.size]
    generator = torch.Generator().manual_seed(0)
    model = train(training, generator)
    params = {name: p.detach() for name, p in model.named_parameters()}
    batches = [make_batch(64, generator) for _ in range(count)]

    symmetry = symgeo.find_symmetry(model)
    loss = symgeo.functional_loss(model)
    manifold = symgeo.ParameterManifold(params, symmetry, metric="inv")
    rows: list[dict[str, Any]] = []
    for name, point in orbit(symmetry, params, generator).items():
        geodesic = symgeo.geodesic_sharpness(loss, point, batches, manifold, rho=0.3, steps=steps)
        adaptive = symgeo.adaptive_sharpness(loss, point, batches, rho=0.3, steps=steps)
        rows.append({"point": name, "loss": float(loss(point, batches[0])), "geodesic": geodesic.value,
                     "adaptive": adaptive.value})

    total = sum(p.numel() for p in params.values())
    print(f"{total} parameters, {symmetry.dimension(params)} flat directions explained by symmetry")
    print(f"{'point':10} {'loss':>12} {'geodesic':>14} {'adaptive':>14}")
    for row in rows:
        print(f"{row['point']:10} {row['loss']:12.8f} {row['geodesic']:14.10f} {row['adaptive']:14.10f}")
    save(chosen.out, "sharpness_of_a_transformer", rows, draw(rows))


if __name__ == "__main__":
    main()
