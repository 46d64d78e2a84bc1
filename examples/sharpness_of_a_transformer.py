"""Sharpness of a trained transformer, and why the adaptive one cannot be trusted.

A BERT from a small config learns to tell whether a sequence holds more tokens of the upper half of the vocabulary,
from labels of which one in ten is wrong.
Then, at the trained weights and at an equivalent point of the same GL orbit:

  1. find the symmetry of the model, verified by random elements;
  2. measure geodesic sharpness (exact geodesics, metric inv) and adaptive sharpness;
  3. see that the function and the geodesic sharpness stand still while the adaptive sharpness moves.

    python examples/sharpness_of_a_transformer.py [--size small|full] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import symgeo

VOCABULARY, LENGTH = 32, 9


def make_batch(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tokens; the label says whether most of them are in the upper half, and is wrong one time in ten."""
    ids = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)
    wrong = torch.rand(size, generator=generator) < 0.1
    return {"input_ids": ids, "labels": ((2 * (ids >= VOCABULARY // 2).sum(1) > LENGTH) ^ wrong).long()}


def train(steps: int, generator: torch.Generator) -> nn.Module:
    """A two-layer BERT, in float64."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                        intermediate_size=48, max_position_embeddings=LENGTH, attn_implementation="eager",
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForSequenceClassification(config).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**make_batch(64, generator)).loss.backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    """Trains, measures, prints and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--out", type=Path, default=Path("examples/out"))
    options = parser.parse_args()
    small = options.size == "small"
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    model = train(60 if small else 400, generator)
    params = {name: p.detach() for name, p in model.named_parameters()}
    batches = [make_batch(64, generator) for _ in range(1 if small else 4)]

    symmetry = symgeo.find_symmetry(model)
    loss = symgeo.functional_loss(model)
    manifold = symgeo.ParameterManifold(params, symmetry, metric="inv")
    action = symmetry.bind(params)
    pairs = [name for name, group in action.groups.items() if isinstance(group, symgeo.groups.GeneralLinear)]

    points = {"trained": params}
    for k in range(3):  # one Gaussian matrix for every head
        shapes = {name: (*action.copies[name], action.sizes[name], action.sizes[name]) for name in pairs}
        draws = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        points[f"orbit {k + 1}"] = action.act(action.element(draws), params)
    rows = []
    for name, point in points.items():
        geodesic = symgeo.geodesic_sharpness(loss, point, batches, manifold, rho=0.3, steps=8 if small else 20)
        adaptive = symgeo.adaptive_sharpness(loss, point, batches, rho=0.3, steps=8 if small else 20)
        rows.append({"point": name, "loss": float(loss(point, batches[0])), "geodesic": geodesic.value,
                     "adaptive": adaptive.value})

    count = sum(p.numel() for p in params.values())
    print(f"{count} parameters, {symmetry.dimension(params)} flat directions explained by symmetry")
    print(f"{'point':10} {'loss':>12} {'geodesic':>14} {'adaptive':>14}")
    for row in rows:
        print(f"{row['point']:10} {row['loss']:12.8f} {row['geodesic']:14.10f} {row['adaptive']:14.10f}")

    options.out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    for kind, marker in (("geodesic", "o"), ("adaptive", "s")):
        names, ratios = [row["point"] for row in rows], [row[kind] / rows[0][kind] for row in rows]
        axes.plot(names, ratios, marker=marker, label=kind)
    axes.set(ylabel="sharpness / sharpness of the trained point", title="Four points, one function", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(options.out / "sharpness_of_a_transformer.png", dpi=150)
    (options.out / "sharpness_of_a_transformer.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
