"""
Declare the symmetry of your own module
=======================================

A token mixer that no table of symgeo knows: every head mixes positions by a matrix of its own, and a gate scales what
it writes. Its symmetry is declared in four lines, tried on random elements, and counted against the flat directions
that the Jacobian of the outputs has. A declaration that forgets a dual fails the trial; one that forgets a generator
passes it and is found by the count. What was declared then carries everything else, here a sharpness.

::

    python examples/declare_a_symmetry.py [--size small|full] [--out DIR]
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from _run import options, save
from matplotlib.figure import Figure
from torch import Tensor, nn

import symgeo
from symgeo.groups import GeneralLinear, Permutation, PositiveScaling

Params = dict[str, Tensor]

# %%
# The module
# ----------
# Nothing in it is special to symgeo.


class Mixer(nn.Module):
    """``out[t] = sum over heads of gate[t, head] * (mix[head] @ x @ value[head])[t] @ output[head]``."""

    def __init__(self, tokens: int, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.value = nn.Parameter(torch.randn(width, heads * inner) / width**0.5)
        self.mix = nn.Parameter(torch.randn(heads, tokens, tokens) / tokens**0.5)
        self.gate = nn.Parameter(torch.randn(width, heads) / width**0.5)
        self.output = nn.Parameter(torch.randn(heads * inner, width) / inner**0.5)

    def forward(self, x: Tensor) -> Tensor:
        value = (x @ self.value).unflatten(-1, (self.heads, -1))  # (..., tokens, heads, inner)
        mixed = torch.einsum("hts,...shf->...thf", self.mix, value)
        gated = (x @ self.gate).sigmoid().unsqueeze(-1) * mixed
        return gated.flatten(-2) @ self.output


# %%
# The declaration
# ---------------
# One string for each parameter, one entry for each axis. Heads have no order (``H``). Within a head the value map may
# be multiplied by any invertible matrix ``f`` if the output map takes it back (``f*``), and by a number ``s`` if the
# mixing matrix takes it back. Two wrong ones beside it: the dual forgotten, and the number forgotten.

TENSORS = {"value": "_ (H f s)", "mix": "(H s*) _ _", "gate": "_ H", "output": "(H f*) _"}
GROUPS = {"H": Permutation(), "f": GeneralLinear(per="H"), "s": PositiveScaling(per="H")}


def declarations(heads: int) -> dict[str, symgeo.Symmetry]:
    """The right one, one that is wrong, and one that is not all."""
    without = {name: group for name, group in GROUPS.items() if name != "s"}
    variants = {
        "as above": (TENSORS, GROUPS),
        "f* written as f": (TENSORS | {"output": "(H f) _"}, GROUPS),
        "s left out": (TENSORS | {"value": "_ (H f)", "mix": "H _ _"}, without),
    }
    return {name: symgeo.Symmetry(tensors, groups, {"H": heads}) for name, (tensors, groups) in variants.items()}


# %%
# Is it true, and is it all?
# --------------------------
# ``symgeo.check`` moves the parameters by random elements and measures what happens to the outputs. ``symgeo.count``
# compares the dimension of the declaration with the number of directions along which the outputs stand still.


def examine(symmetry: symgeo.Symmetry, model: nn.Module, params: Params, x: Tensor) -> dict[str, Any]:
    """One row of the table."""

    def f(p: Params) -> tuple[Tensor, ...]:
        return tuple(torch.func.functional_call(model, p, (piece,)) for piece in x)

    report = symgeo.check(symmetry, f, params, generator=torch.Generator().manual_seed(0))
    row: dict[str, Any] = {"change of the outputs": report.invariance, "holds": report.ok}
    if report.ok:
        found = symgeo.count(symmetry, f, params)
        row |= {"declared": found.declared, "measured": found.measured, "complete": found.complete}
    return row


# %%
# What follows from it
# --------------------
# A random element changes the parameters and not the function. Geodesic sharpness, on the quotient by the group that
# was declared, does not change; adaptive sharpness does.


def sharpness(symmetry: symgeo.Symmetry, model: nn.Module, params: Params, x: Tensor, steps: int) -> dict[str, Any]:
    """Of the parameters, and of others of the same function."""
    generator = torch.Generator().manual_seed(1)
    action = symmetry.bind(params)
    moved = action.act(action.random(generator), params)
    targets = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    loss = symgeo.functional_loss(model, nn.functional.mse_loss)
    manifold = symgeo.ParameterManifold(params, symmetry, metric="inv")
    found: dict[str, Any] = {}
    for name, point in {"as drawn": params, "moved": moved}.items():
        geodesic = symgeo.geodesic_sharpness(loss, point, [(x, targets)], manifold, rho=0.1, steps=steps)
        adaptive = symgeo.adaptive_sharpness(loss, point, [(x, targets)], rho=0.1, steps=steps)
        found[name] = {"geodesic": geodesic.value, "adaptive": adaptive.value}
    return found


def draw(rows: dict[str, dict[str, Any]]) -> Figure:
    """What the trial and the count say of each declaration."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    names = list(rows)
    colours = ["C0" if row["holds"] else "C3" for row in rows.values()]
    left.barh(names, [row["change of the outputs"] for row in rows.values()], color=colours, left=1e-17)
    left.axvline(1e-6, color="black", linewidth=0.8, linestyle=":")
    left.set(xscale="log", xlim=(1e-17, 10), xlabel="change of the outputs (dotted: what is accepted)")
    for place, row in enumerate(rows.values()):
        if row["holds"]:
            right.barh(place - 0.2, row["declared"], 0.36, color="C0", label="declared" if place == 0 else None)
            right.barh(place + 0.2, row["measured"], 0.36, color="C7", label="measured" if place == 0 else None)
        else:
            right.text(0, place, " refused", va="center")
    right.set(xlabel="flat directions")
    right.legend(frameon=False)
    left.invert_yaxis()
    return figure


def main() -> None:
    """Declares, tries, counts, prints and plots."""
    chosen = options(__doc__)
    tokens, width, heads, inner, steps = {"small": (5, 7, 2, 3, 5), "full": (7, 11, 3, 5, 20)}[chosen.size]
    torch.manual_seed(0)
    model = Mixer(tokens, width, heads, inner).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(30, tokens, width, dtype=torch.float64)

    rows = {name: examine(symmetry, model, params, x) for name, symmetry in declarations(heads).items()}
    columns = "".join(f"{key:>10}" for key in ("holds", "declared", "measured", "complete"))
    print(f"{'declaration':18}{'change of the outputs':>22}{columns}")
    for name, row in rows.items():
        counted = "".join(f"{row.get(key, '-')!s:>10}" for key in ("declared", "measured", "complete"))
        print(f"{name:18}{row['change of the outputs']:22.1e}{row['holds']!s:>10}{counted}")

    found = sharpness(declarations(heads)["as above"], model, params, x, steps)
    print(f"\n{'parameters':12}{'geodesic sharpness':>22}{'adaptive sharpness':>22}")
    for name, values in found.items():
        print(f"{name:12}{values['geodesic']:22.12f}{values['adaptive']:22.12f}")
    save(chosen.out, "declare_a_symmetry", {"declarations": rows, "sharpness": found}, draw(rows))


if __name__ == "__main__":
    main()
