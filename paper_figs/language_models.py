"""Sharpness against generalization of small language models on Python source.

Compare figure 5 of "Hide & Seek" (arXiv 2505.05409): BERT on MNLI, where Kendall's tau with the generalization gap
is 0.06 (adaptive), 0.28 (geodesic, inv) and 0.38 (geodesic, mix). Here tiny transformers learn to predict the next
character of a piece of Python's standard library, with different learning rates, weight decays, batch sizes and
seeds: once from scratch, and once all from one pretrained model. Each is trained until its loss on the piece is at
most a target. The paper names no radius: it is swept.
"""

from dataclasses import asdict, replace
from typing import Any

import torch
from _common import main
from _correlations import draw_studies, inv_less_adaptive, table
from _populations import TINY, Reading, language_models, paces
from matplotlib.figure import Figure

from symgeo.study import study

PAPER = {"adaptive": 0.06, "geodesic inv": 0.28, "geodesic mix": 0.38}
RADII = {
    "euclidean": (0.03, 0.1, 0.3),
    "adaptive": (0.1, 0.3, 1.0),
    "geodesic inv": (0.1, 0.3, 1.0),
    "geodesic mix": (0.1, 0.3, 1.0),
}
SHOWN = {"euclidean": 0.1, "adaptive": 0.3, "geodesic inv": 0.3, "geodesic mix": 0.3}
NOTES = [
    "Gaps are held-out minus training, in nats and in error of the next character. Models that do not reach the "
    "target are left out.",
    "Training ends at the first check that meets the target, so that training losses are equal to about the progress "
    "between two checks, and the gap is the held-out loss but for that.",
    "Radii of different measures have different units: compare whole curves over rho.",
    "The text is that of the Python in use.",
]


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """Models by measure, and tau over the radius, for both kinds of training."""
    full = size == "full"
    scratch, tuned = (Reading(), replace(Reading(), target=0.8)) if full else (TINY, TINY)
    if full:
        settings = paces((3e-3, 1e-2), (0.0, 0.3), (16, 64), 2, seed)
        radii, steps = RADII, 10
    else:
        settings = paces((5e-3, 1e-2), (0.0,), (16,), 2, seed)
        radii, steps = {measure: (rho,) for measure, rho in SHOWN.items()}, 3
    populations = {
        "from scratch": language_models(scratch, settings, seed, torch.float32),
        "fine-tuned": language_models(tuned, settings, seed, torch.float32, fine_tuned=True),
    }
    studies = {
        name: study(population.candidates, radii, steps=steps, seed=seed) for name, population in populations.items()
    }
    rows = [(name, found, "loss gap") for name, found in studies.items()]
    return draw_studies(rows, SHOWN, PAPER), {
        "parameters": {"radii": radii, "steps": steps, "scratch": asdict(scratch), "fine-tuned": asdict(tuned)},
        "paper_tau": PAPER,
        "tau": {name: table(found) for name, found in studies.items()},
        "tau of inv less that of adaptive": {
            name: inv_less_adaptive(found, "loss gap", seed) for name, found in studies.items()
        },
        "populations": {name: population.record() for name, population in populations.items()},
        "studies": {name: found.to_dict() for name, found in studies.items()},
        "notes": NOTES,
    }


if __name__ == "__main__":
    main("language_models", draw, __doc__.splitlines()[0])
