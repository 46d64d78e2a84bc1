"""
A preconditioner from a group
=============================

Declare a group, get a curvature from one gradient and a preconditioned step. The hidden units of a small
tanh network can be exchanged, and each can change sign: signed permutations. From that declaration and one gradient
come an estimate of the Hessian, in blocks whose size does not grow with the network, and the step of its inverse. Both
are compared with the dense Hessian that autograd computes, and with other groups: one line of the declaration changes
the method. The last row is the identity, which is what following the gradient itself amounts to: an estimate whose
cosine to the Hessian is below that row's, as in the small size, knows less of it than no estimate.

::

    python examples/precondition_from_a_group.py [--size small|full] [--out DIR]
"""

from __future__ import annotations

from typing import Any

import torch
from _matrices import cosine, dense_hessian, flat, side_by_side, unflat
from _run import options, save
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import symgeo
from symgeo.curvature import estimate, precondition
from symgeo.groups import Orthogonal, Permutation, SignFlip
from symgeo.preconditioner import describe

Params = dict[str, Tensor]

# %%
# Groups
# ------
# The symmetry of the network, and two groups that are none of it and give other methods.

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

# %%
# The comparison
# --------------
# Each estimate against the dense Hessian, and the loss after the best step along its direction.


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


def line_search(loss: Any, params: Params, step: Params, batch: Any) -> float:
    """The lowest loss along a step, over twelve lengths."""
    lengths = [2.0**-k for k in range(12)]
    return min(float(loss({n: p - t * step[n] for n, p in params.items()}, batch)) for t in lengths)


def main() -> None:
    """Estimates, compares, prints and plots."""
    chosen = options(__doc__)
    model, batch = trained(*{"small": (7, 20), "full": (16, 200)}[chosen.size])

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
    save(chosen.out, "precondition_from_a_group", rows, side_by_side(pictures))


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
    step = unflat(torch.linalg.solve(damped, flat(grads)), params)
    rows.append({"group": "none: |Hessian|, damped", "numbers kept": len(hessian) ** 2,
                 "cosine to the Hessian": cosine(damped, hessian),
                 "loss after a step": line_search(loss, params, step, batch)})
    rows.append({"group": "none: identity (the gradient itself)", "numbers kept": 0,
                 "cosine to the Hessian": cosine(identity, hessian),
                 "loss after a step": line_search(loss, params, grads, batch)})
    return rows, pictures


def absolute(hessian: Tensor) -> Tensor:
    """|H|"""
    values, vectors = torch.linalg.eigh(hessian)
    return (vectors * values.abs()) @ vectors.T


if __name__ == "__main__":
    main()
