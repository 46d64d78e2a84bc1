"""
Sharpness against generalization over checkpoints
=================================================

Small vision transformers are trained on few digits with several learning rates, weight decays and seeds, and saved.
The study loads the files one by one, measures every kind of sharpness at several radii, and correlates it with the
generalization gaps: Kendall's tau with a bootstrap interval. What cannot be measured is named, with the reason.
(``symgeo study`` does the same for model folders on the command line; ``symgeo demo`` for two dozen models.)

::

    python examples/study_checkpoints.py [--size small|medium|full] [--out DIR]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from _run import options, save
from _training import train
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

import symgeo
from symgeo.data import Digits, digits
from symgeo.models.tiny_vit import TinyViT
from symgeo.plots import plot_scatter
from symgeo.study import Candidate, Lazy, study


@dataclass(frozen=True)
class Size:
    """Of the networks, of the search for a worst perturbation, and of the grid of settings."""

    width: int
    mlp_width: int
    training_images: int
    training_steps: int
    steps: int
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    seeds: tuple[int, ...]


SIZES = {
    "small": Size(8, 11, 100, 80, 3, (1e-2, 3e-2), (0.0, 0.3, 1.0), (0,)),
    "medium": Size(8, 11, 100, 150, 5, (3e-3, 1e-2, 2e-2, 4e-2), (0.0, 0.3, 1.0), (0, 1)),
    "full": Size(16, 32, 200, 300, 8, (3e-3, 1e-2, 3e-2), (0.0, 1.0), (0, 1)),
}
RADII = {"euclidean": (0.1,), "adaptive": (1.0,), "geodesic inv": (0.3,), "geodesic mix": (0.3,)}


def network(size: Size, seed: int = 0) -> TinyViT:
    """One block, patches of 4 x 4 pixels."""
    generator = torch.Generator().manual_seed(seed)
    return TinyViT(patch_size=4, depth=1, width=size.width, heads=2, mlp_width=size.mlp_width, generator=generator)


# %%
# Checkpoints
# -----------
# Files as any training run leaves them.


def checkpoints(size: Size, data: Digits, folder: Path) -> list[Path]:
    """One file for each setting."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for rate, decay, seed in product(size.rates, size.decays, size.seeds):
        model = network(size, seed)
        train(model, data.train_images, data.train_labels, size.training_steps, rate, seed, decay)
        files.append(folder / f"rate {rate:g}, decay {decay:g}, seed {seed}.safetensors")
        save_file(model.state_dict(), files[-1])
    return files


# %%
# Candidates
# ----------
# What the study needs of a model: its loss, its parameters, the batches on which sharpness is measured, its gaps,
# and its symmetry. A ``Lazy`` one is loaded when its turn comes, in a worker process if there are several.


def candidate(file: Path, size: Size, data: Digits) -> Candidate:
    """Reads a checkpoint and measures its gaps."""
    model = network(size)
    model.load_state_dict(load_file(file))
    model.eval()
    train_loss, train_error = evaluate(model, data.train_images, data.train_labels)
    test_loss, test_error = evaluate(model, data.test_images, data.test_labels)
    return Candidate(
        name=file.stem,
        loss=symgeo.functional_loss(model, cross_entropy),
        params={name: p.detach() for name, p in model.named_parameters()},
        batches=[(data.train_images, data.train_labels)],
        gaps={"loss gap": test_loss - train_loss, "error gap": test_error - train_error},
        symmetry=symgeo.find_symmetry(model),
    )


@torch.no_grad()
def evaluate(model: torch.nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss and error rate."""
    logits = model(images)
    return float(cross_entropy(logits, labels)), float((logits.argmax(-1) != labels).double().mean())


# %%
# The study
# ---------
# Six models, the small size, say nothing: intervals reach from -1 to above 0. With 24, the medium size and ``symgeo
# demo``, they are 0.4 to 0.8 wide.


def main() -> None:
    """Trains, measures, prints and plots."""
    chosen = options(__doc__, tuple(SIZES))
    size = SIZES[chosen.size]
    data = digits(train=size.training_images)
    files = checkpoints(size, data, chosen.out / "study_checkpoints")
    found = study([Lazy(file.stem, partial(candidate, file, size, data)) for file in files], RADII, steps=size.steps)
    print(found)
    for line in found.failures:
        print(f"left out: {line}")
    plot_scatter(found, {measure: radii[0] for measure, radii in RADII.items()}, chosen.out / "study_checkpoints.png")
    save(chosen.out, "study_checkpoints", found.to_dict())


if __name__ == "__main__":
    main()
