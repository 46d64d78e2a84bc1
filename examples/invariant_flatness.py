"""
Flatness that no gauge changes
==============================

Two copies of one transformer, as flat as one likes, and what a Hessian that knows the symmetry says. A small vision
transformer learns the digits. Its twin has other parameters and is the same function: hidden units and
heads in another order, and in every head a random matrix of condition number 100 between query and key, another
between value and output. Then, for both:

1. the top eigenvalues and the trace of the Euclidean Hessian, which differ;
2. those of the covariant Hessian on the quotient: the eigenvalues agree to rounding; so do the traces where they are
   computed, and where they are estimated (Hutchinson, more than a thousand parameters) they agree within the standard
   errors printed beside them;
3. how many directions leave the loss unchanged because the symmetry says so, and how many eigenvalues of the Euclidean
   Hessian are near zero. At a minimum the former are among the latter. Away from one, and training stops before, they
   are not: an orbit is curved in the space of parameters, so that along its straight tangent the loss changes in second
   order, in proportion to the gradient;
4. the densities of both spectra, in one picture.

::

    python examples/invariant_flatness.py [--size small|full] [--out DIR]
"""

from __future__ import annotations

from dataclasses import replace

import torch
from _run import options, save
from torch.nn.functional import cross_entropy

import symgeo
from symgeo.data import digits
from symgeo.demo.orbit import gauge_change
from symgeo.flatness import Flatness, FlatPoint, measure_flatness
from symgeo.functional import Params
from symgeo.groups import Permutation
from symgeo.models.tiny_vit import TinyViT
from symgeo.plots import plot_spectrum

# %%
# A model and its twin
# --------------------


def train(model: TinyViT, images: torch.Tensor, labels: torch.Tensor, steps: int) -> Params:
    """Full batches, AdamW without decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def twin(symmetry: symgeo.Symmetry, params: Params, seed: int) -> Params:
    """Another point of the orbit: heads and hidden units permuted, and a random matrix in every head."""
    action, generator = symmetry.bind(params), torch.Generator().manual_seed(seed)
    discrete = [name for name, group in action.groups.items() if isinstance(group, Permutation)]
    permuted = action.act(action.random(generator, only=discrete), params)
    return action.act(gauge_change(action, 100.0, generator), permuted)


# %%
# Both Hessians at both points
# ----------------------------


def row(kind: str, name: str, point: FlatPoint) -> dict[str, object]:
    """One line of the table."""
    spectrum = point.euclidean if kind == "Euclidean" else point.invariant
    return {"hessian": kind, "point": name, "loss": point.loss, "top": list(spectrum.top),
            "trace": spectrum.trace.value, "stderr": spectrum.trace.stderr}


def main() -> None:
    """Trains, measures, prints and plots."""
    chosen = options(__doc__)
    small = chosen.size == "small"
    data = digits(train=60 if small else 200)
    images, labels = data.train_images.double(), data.train_labels
    sizes = {"width": 8, "heads": 2, "mlp_width": 11} if small else {"width": 16, "heads": 2, "mlp_width": 24}
    model = TinyViT(patch_size=4, depth=1, **sizes).double()
    params = train(model, images, labels, 200 if small else 1000)
    model.eval()

    symmetry = symgeo.find_symmetry(model)
    loss = symgeo.functional_loss(model, cross_entropy)
    measured = {
        name: measure_flatness(loss, point, [(images, labels)], symmetry, top=3, orbits=0, density=True)
        for name, point in (("trained", params), ("twin", twin(symmetry, params, 1)))
    }
    rows = [row(kind, name, found.points[0]) for kind in ("Euclidean", "covariant") for name, found in measured.items()]

    print(f"{'hessian':10} {'point':8} {'loss':>12} {'eigenvalue 1':>14} {'eigenvalue 2':>14} {'trace':>22}")
    for line, (first, second, *_) in ((line, line["top"]) for line in rows):
        print(f"{line['hessian']:10} {line['point']:8} {line['loss']:12.9f} {first:14.8f} {second:14.8f} "
              f"{line['trace']:12.5f} ± {line['stderr']:.1g}")
    start = measured["trained"]
    print(f"gradient norm {start.gradient:.1e}; {start.explained} of {start.parameters} directions leave the loss "
          f"unchanged by symmetry; near-zero eigenvalues of the Euclidean Hessian: {start.flat}")
    if start.flat.value < start.explained:
        print("No minimum: directions of the symmetry are flat along the orbit and curved along straight lines.")

    plot_spectrum(side_by_side(measured), chosen.out / "invariant_flatness.png")
    record = {"rows": rows, "flat": start.flat.value, "explained": start.explained, "parameters": start.parameters,
              "gradient": start.gradient}
    save(chosen.out, "invariant_flatness", record)


def side_by_side(measured: dict[str, Flatness]) -> Flatness:
    """Both as points of one picture."""
    points = [replace(found.points[0], name=name) for name, found in measured.items()]
    return replace(next(iter(measured.values())), points=tuple(points))


if __name__ == "__main__":
    main()
