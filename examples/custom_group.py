"""
A group of your own
===================

Units on a ring: features are computed at every place of the ring, a filter runs round it, and the output is pooled over
the places. Turning the ring, or turning it over, changes nothing. These are the 2n symmetries of a regular polygon, the
dihedral group, which symgeo does not have. A group is a few facts: how an element acts on rows, the identity, random
elements, inverses and products. With them it takes part in declarations, and its average gives a curvature from
one gradient.

::

    python examples/custom_group.py [--size small|full] [--out DIR]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from _matrices import cosine, dense_hessian, flat, side_by_side
from _run import options, save
from torch import Tensor, nn

import symgeo
from symgeo.curvature import InvariantOperator, estimate, orbit_average, orbit_mean
from symgeo.groups import Cyclic, Group, Permutation

Params = dict[str, Tensor]

# %%
# The group
# ---------
# An element is a pair (shift, flip) of whole numbers. It first turns the ring over, if flip is 1, and then shifts it:
# ``act(g, y)[j] = y[sign (j - shift) mod n]`` with ``sign = 1 - 2 flip``.


@dataclass(frozen=True)
class Dihedral(Group):
    """The symmetries of a regular polygon with n corners."""

    orthogonal: ClassVar[bool] = True
    discrete: ClassVar[bool] = True
    monomial: ClassVar[bool] = False

    def element_shape(self, n: int) -> tuple[int, ...]:
        """(shift, flip)"""
        return (2,)

    def dimension(self, n: int) -> int:
        """A finite group has no tangent directions."""
        return 0

    def apply(self, g: Tensor, rows: Tensor, dual: bool) -> Tensor:
        """On rows (*batch, m, n); the dual is the same, since elements are orthogonal matrices."""
        n = rows.shape[-1]
        shift, sign = _parts(g)
        source = sign.unsqueeze(-1) * (torch.arange(n, device=rows.device) - shift.unsqueeze(-1)) % n
        return rows.gather(-1, source.unsqueeze(-2).expand(rows.shape))

    def identity(self, n: int, batch: Any = (), dtype: Any = None, device: Any = None) -> Tensor:
        """No shift and no flip."""
        return torch.zeros(*batch, 2, dtype=torch.int64, device=device)

    def draw(self, n: int, batch: Any, generator: Any, dtype: Any, device: Any) -> Tensor:
        """All 2 n elements alike."""
        drawn = torch.rand(*batch, 2, generator=generator, dtype=torch.float64)
        return (drawn * torch.tensor([n, 2])).long().to(device)

    def inverse(self, g: Tensor) -> Tensor:
        """A flip is its own inverse, and so is a flip with a shift."""
        shift, sign = _parts(g)
        return torch.stack([-sign * shift, (1 - sign) // 2], dim=-1)

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        """First h, then g."""
        (shift, sign), (other, other_sign) = _parts(g), _parts(h)
        return torch.stack([shift + sign * other, (1 - sign * other_sign) // 2], dim=-1)

    def algebra(self, coefficients: Tensor, n: int) -> Tensor:
        """Zero."""
        return coefficients.new_zeros(*coefficients.shape[:-1], 2)

    def orbit_dimension(self, plain: Tensor, dual: Tensor) -> int:
        """0"""
        return 0


def _parts(g: Tensor) -> tuple[Tensor, Tensor]:
    shift, flip = g.round().long().unbind(-1)
    return shift, 1 - 2 * flip


# %%
# The network, and its symmetry
# -----------------------------
# The features, their biases and the filter all stand on the ring, and move together.


class Ring(nn.Module):
    """``h = tanh(features x + bias)``, ``c[j] = sum_i filter[i - j] h[i]``, and the means of tanh(c) and c^2."""

    def __init__(self, inputs: int, places: int) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.randn(places, inputs))
        self.bias = nn.Parameter(torch.randn(places))
        self.filter = nn.Parameter(torch.randn(places) / places**0.5)
        self.readout = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x @ self.features.mT + self.bias).tanh()
        turned = torch.stack([self.filter.roll(j) for j in range(len(self.filter))])
        found = hidden @ turned.mT
        return torch.stack([found.tanh().mean(-1), found.square().mean(-1)], dim=-1) @ self.readout


TENSORS = {"features": "c _", "bias": "c", "filter": "c"}
POLYGON, SHIFTS = symgeo.Symmetry(TENSORS, {"c": Dihedral()}), symgeo.Symmetry(TENSORS, {"c": Cyclic()})
TOO_LARGE = symgeo.Symmetry(TENSORS, {"c": Permutation()})

# %%
# Averages
# --------
# ``symgeo.curvature`` has transforms for its own groups. A larger group is averaged through one of them: every element
# of the polygon's is a shift after a flip or none, so that its average is the mean of two averages over shifts, and
# as cheap. The loop over all elements, which only a small group allows, is the test.


def polygon_mean(grads: Params, flipped: Params) -> Params:
    """The mean of a gradient over its orbit."""
    means = [orbit_mean(SHIFTS, u) for u in (grads, flipped)]
    return {name: 0.5 * (means[0][name] + means[1][name]) for name in grads}


def polygon_average(grads: Params, flipped: Params) -> InvariantOperator:
    """The mean of g g^T over the orbit of a gradient."""
    return 0.5 * (orbit_average(SHIFTS, grads) + orbit_average(SHIFTS, flipped))


def polygon_estimate(params: Params, grads: Params, flipped: Params) -> InvariantOperator:
    """The Hessian from one gradient: the root of such a mean, as in ``symgeo.curvature.estimate``."""
    squares = [h @ h for h in (estimate(params, u, SHIFTS) for u in (grads, flipped))]
    return (0.5 * (squares[0] + squares[1])).sqrt()


def by_definition(grads: Params) -> tuple[Tensor, Tensor]:
    """Both, by the sum over all elements."""
    action, places = POLYGON.bind(grads), len(grads["bias"])
    elements = [action.element({"c": torch.tensor([k, flip])}) for k in range(places) for flip in (0, 1)]
    orbit = torch.stack([flat(action.act(g, grads)) for g in elements])
    return orbit.mean(0), orbit.mT @ orbit / len(orbit)


# %%
# Try it
# ------
# The declaration is tried as any other. Under all permutations of the places, a larger group, it must fail.


def main() -> None:
    """Declares, tries, averages, prints and plots."""
    chosen = options(__doc__)
    places = {"small": 24, "full": 48}[chosen.size]
    torch.manual_seed(0)
    model = Ring(3, places).double()
    x = torch.randn(64, 3, dtype=torch.float64)
    batch = x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], dim=-1)
    params = {name: p.detach() for name, p in model.named_parameters()}
    loss = symgeo.functional_loss(model, nn.functional.mse_loss)

    def outputs(p: Params) -> Tensor:
        return torch.func.functional_call(model, p, (x,))

    print(f"{'group':28}{'change of the outputs':>22}{'holds':>8}")
    checks = {}
    for name, symmetry in {"dihedral": POLYGON, "shifts alone": SHIFTS, "all permutations": TOO_LARGE}.items():
        report = symgeo.check(symmetry, outputs, params, generator=torch.Generator().manual_seed(0))
        checks[name] = {"change": report.invariance, "holds": report.ok}
        print(f"{name:28}{report.invariance:22.1e}{report.ok!s:>8}")

    grads = torch.func.grad(loss)(params, batch)
    action = POLYGON.bind(params)
    flipped = action.act(action.element({"c": torch.tensor([0, 1])}), grads)
    second, (mean, moment) = polygon_average(grads, flipped), by_definition(grads)
    errors = {
        "mean": float((flat(polygon_mean(grads, flipped)) - mean).norm() / mean.norm()),
        "second moment": float((second.dense() - moment).norm() / moment.norm()),
    }
    print("\naverages against the sum over all elements, relative:", *(f"{k} {v:.0e}" for k, v in errors.items()))

    hessian = dense_hessian(loss, params, batch)
    g = flat(grads)
    estimates = {
        "one gradient alone": torch.outer(g, g) / g.norm(),
        "shifts": estimate(params, grads, SHIFTS).dense(),
        "dihedral": polygon_estimate(params, grads, flipped).dense(),
    }
    cosines = {name: cosine(matrix, hessian) for name, matrix in estimates.items()}
    print(f"\n{'Hessian estimated by':28}{'cosine to the Hessian':>22}")
    for name, value in cosines.items():
        print(f"{name:28}{value:22.3f}")
    record = {"checks": checks, "errors": errors, "cosines": cosines}
    save(chosen.out, "custom_group", record, side_by_side({"Hessian, by autograd": hessian, **estimates}, power=1 / 3))


if __name__ == "__main__":
    main()
