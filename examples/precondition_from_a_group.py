"""Declare a group, get a curvature from one gradient and a preconditioned step.

The hidden units of a small tanh network can be exchanged, and each can change sign: signed permutations. From that
declaration and one gradient come an estimate of the Hessian, in blocks whose size does not grow with the network, and
the step of its inverse. Both are compared with the dense Hessian that autograd computes, and with other groups: one
line of the declaration changes the method.

    python examples/precondition_from_a_group.py [--size small|full] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import symgeo
from symgeo.curvature import estimate, precondition
from symgeo.groups import Orthogonal, Permutation, SignFlip
from symgeo.preconditioner import describe

Params = dict[str, Tensor]

TENSORS = {"0.weight": "(h s) _", "0.bias": "(h s)", "2.weight": "_ (h s)", "2.bias": "_"}
UNITS = symgeo.Symmetry(TENSORS, {"h": Permutation(), "s": SignFlip(per="h")}, {"s": 1})
GROUPS = {
    "signed permutations of the units": UNITS,
    "signs of every entry": symgeo.Symmetry(
        {"0.weight": "a b", "0.bias": "c", "2.weight": "d e", "2.bias": "f"},
        {name: SignFlip() for name in "abcdef"},
    ),
    "rotations of one axis per matrix": symgeo.Symmetry(
        {"0.weight": "a _", "0.bias": "c", "2.weight": "_ e", "2.bias": "f"},
        {name: Orthogonal() for name in "acef"},
    ),
}


def flat(params: Params) -> Tensor:
    """All entries in one vector."""
    return torch.cat([p.flatten() for p in params.values()])


def trained(width: int, steps: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A network 5-width-2 and its data, in float64, after some steps of gradient descent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 2)).double()
    x = torch.randn(128, 5, dtype=torch.float64)
    batch = x, (x[:, :2] * x[:, 2:4]).sin()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        mse_loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return model, batch


def dense_hessian(loss: Any, params: Params, batch: Any) -> Tensor:
    """By autograd, in flat order."""
    sizes = [p.numel() for p in params.values()]

    def of_vector(x: Tensor) -> Tensor:
        parts = zip(params.items(), x.split(sizes))
        return loss({name: piece.reshape(p.shape) for (name, p), piece in parts}, batch)

    hessian: Tensor = torch.func.hessian(of_vector)(flat(params))
    return hessian


def line_search(loss: Any, params: Params, step: Params, batch: Any) -> float:
    """The lowest loss along a step, over twelve lengths."""
    lengths = [2.0**-k for k in range(12)]
    return min(float(loss({n: p - t * step[n] for n, p in params.items()}, batch)) for t in lengths)


def main() -> None:
    """Estimates, compares, prints and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--out", type=Path, default=Path("examples/out"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, batch = trained(*{"small": (7, 20), "full": (16, 200)}[options.size])

    loss = symgeo.functional_loss(model, mse_loss)
    params = {name: p.detach() for name, p in model.named_parameters()}
    grads = torch.func.grad(loss)(params, batch)
    hessian = dense_hessian(loss, params, batch)
    report = symgeo.check(UNITS, lambda p: torch.func.functional_call(model, p, (batch[0],)), params)
    print(f"{len(hessian)} parameters; the network changes by {report.invariance:.0e} under signed permutations\n")

    rows, pictures = compare(loss, params, batch, grads, hessian)
    print(f"{'':36}{'numbers kept':>13}{'cosine to H':>13}{f'loss {float(loss(params, batch)):.4f} ->':>16}")
    for row in rows:
        print(f"{row['group']:36}{row['numbers kept']:13}{row['cosine to the Hessian']:13.3f}"
              f"{row['loss after a step']:16.4f}")
    save(rows, pictures, options.out)


def compare(
    loss: Any, params: Params, batch: Any, grads: Params, hessian: Tensor
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A row for each group, and for steps that know no group; the matrices."""
    rows, pictures = [], {"Hessian, by autograd": hessian}
    for name, symmetry in GROUPS.items():
        pictures[name] = estimate(params, grads, symmetry).dense()
        step = precondition(params, grads, symmetry, damping=1e-4)
        rows.append({"group": name, "numbers kept": describe(symmetry, params).state,
                     "cosine to the Hessian": cosine(pictures[name], hessian),
                     "loss after a step": line_search(loss, params, step, batch)})
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    damped = absolute(hessian) + 1e-2 * hessian.abs().max() * identity
    newton = torch.linalg.solve(damped, flat(grads)).split([p.numel() for p in params.values()])
    step = {name: piece.reshape(p.shape) for (name, p), piece in zip(params.items(), newton)}
    rows.append({"group": "none: |Hessian|, damped", "numbers kept": len(hessian) ** 2,
                 "cosine to the Hessian": cosine(damped, hessian),
                 "loss after a step": line_search(loss, params, step, batch)})
    rows.append({"group": "none: the gradient itself", "numbers kept": 0,
                 "cosine to the Hessian": cosine(identity, hessian),
                 "loss after a step": line_search(loss, params, grads, batch)})
    return rows, pictures


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two matrices."""
    return float((a * b).sum() / a.norm() / b.norm())


def absolute(hessian: Tensor) -> Tensor:
    """|H|"""
    values, vectors = torch.linalg.eigh(hessian)
    return (vectors * values.abs()) @ vectors.T


def save(rows: list[dict[str, Any]], pictures: dict[str, Tensor], folder: Path) -> None:
    """The matrices side by side, each in units of its largest entry, and the table."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(pictures), figsize=(3 * len(pictures), 3.3), layout="constrained")
    for ax, (name, matrix) in zip(axes, pictures.items()):
        ax.imshow(matrix / matrix.abs().max(), cmap="RdBu", vmin=-1, vmax=1)
        ax.set_title(name, fontsize=8)
        ax.set_axis_off()
    figure.savefig(folder / "precondition_from_a_group.png", dpi=150)
    (folder / "precondition_from_a_group.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
