"""Sharpness against generalization of vision transformers on the digits.

Compare figure 4 of "Hide & Seek" (arXiv 2505.05409): transformers on ImageNet, where Kendall's tau with the
generalization gap is -0.41 (adaptive), -0.71 (geodesic, inv) and -0.70 (geodesic, mix). Here they are tiny and learn
scikit-learn's digits, with different learning rates, weight decays, initial scales, batch sizes and seeds. The radii
are those of `symgeo demo`, since the paper names none.
"""

from typing import Any

import torch
from _common import main
from _correlations import draw_studies, inv_less_adaptive, restricted, table
from _populations import handful, vision_transformers
from matplotlib.figure import Figure

from symgeo.demo.run import RADII
from symgeo.demo.training import full as recipe
from symgeo.study import study

PAPER = {"adaptive": -0.41, "geodesic inv": -0.71, "geodesic mix": -0.70}
SHOWN = {"euclidean": 0.1, "adaptive": 1.0, "geodesic inv": 0.3, "geodesic mix": 0.3}
NOTES = [
    "Gaps are test minus training, over the whole split. Models below 98 % training accuracy (none in the small size) "
    "are left out.",
    "Radii of different measures have different units: compare whole curves over rho.",
    "'without decay': the models trained without weight decay, from the same measurements.",
]


def draw(size: str, seed: int) -> tuple[Figure, dict[str, Any]]:
    """Models by measure and gap, and tau over the radius; all models, and those without weight decay."""
    full = size == "full"
    if full:
        population = vision_transformers(recipe(seed), 128, torch.float32)
        radii, steps = RADII, 10
    else:
        population = handful(seed, torch.float32)
        radii, steps = {measure: (rho,) for measure, rho in SHOWN.items()}, 3
    studies = {"all models": study(population.candidates, radii, steps=steps, seed=seed)}
    undecayed = {row["name"] for row in population.rows if row["kept"] and row["weight_decay"] == 0}
    studies["without decay"] = restricted(studies["all models"], undecayed, seed)
    rows = [("all models", studies["all models"], gap) for gap in ("loss gap", "error gap")]
    rows.append(("without decay", studies["without decay"], "loss gap"))
    return draw_studies(rows, SHOWN, PAPER), {
        "parameters": {"radii": radii, "steps": steps},
        "paper_tau": PAPER,
        "tau": {name: table(found) for name, found in studies.items()},
        "tau of inv less that of adaptive": {
            name: inv_less_adaptive(found, "loss gap", seed) for name, found in studies.items()
        },
        "population": population.record(),
        "study": studies["all models"].to_dict(),
        "notes": NOTES,
    }


if __name__ == "__main__":
    main("vision_transformers", draw, __doc__.splitlines()[0])
