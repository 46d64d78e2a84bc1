"""The balanced gauge of an optimizer: where its statistics live when a symmetry has non-compact groups."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manifolds.linalg import widen
from symgeo.curvature import balance, dual
from symgeo.functional import Params
from symgeo.groups import GeneralLinear, PositiveScaling, Rotary
from symgeo.symmetry import Action, Element, Symmetry


class Gauge:
    """Carries parameters and gradients into the balanced gauge at one point, and steps back.

    With the gauge element A, parameters move by A, gradients by A^-T, and steps back by A^-1.  Representatives of
    one orbit have balanced gauges that differ by an element of the maximal compact subgroup, on which nothing
    invariant depends, so that all steps together move along with the representative.

    A pair of a GeneralLinear group that is deficient on one side (LoRA with B = 0) has no balanced gauge.  Its other
    side is first made orthonormal, which fixes the gauge up to O(n); then the pair is balanced, with what
    `symgeo.curvature.balance` does for deficient pairs, in a gauge in which that commutes with O(n).  Pairs that are
    deficient on both sides, and groups that share a parameter with another one, keep the rule of `balance`.

    >>> lora = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})
    >>> point = {"B": torch.zeros(3, 1), "A": torch.tensor([[3.0, 4.0]])}
    >>> Gauge(lora, lora.bind(point), point).params["A"]
    tensor([[0.6000, 0.8000]], dtype=torch.float64)
    """

    def __init__(self, symmetry: Symmetry, action: Action, params: Mapping[str, Tensor]) -> None:
        self._action = action
        wide = {name: widen(x.detach()) for name, x in params.items()}
        first = Element({name: _orthonormal(*action.stack(name, wide)) for name in _separate(action)})
        self.params, then = balance(symmetry, action.act(first, wide))
        tensors = dict(then.tensors)
        for name, g in first.items():
            tensors[name] = action.groups[name].compose(tensors[name], g) if name in tensors else g
        element = Element(tensors)
        self._dual, self._inverse = dual(action, element), action.inverse(element)

    def gradients(self, tensors: Mapping[str, Tensor]) -> Params:
        """Gradients, or averages of them, in the balanced gauge."""
        return self._moved(self._dual, tensors)

    def back(self, step: Mapping[str, Tensor]) -> Params:
        """A step in the gauge of the parameters themselves."""
        return self._moved(self._inverse, step)

    def _moved(self, g: Element, tensors: Mapping[str, Tensor]) -> Params:
        missing = {name: torch.zeros_like(x) for name, x in self.params.items() if name not in tensors}
        moved = self._action.act(g, {**tensors, **missing})
        return {name: moved[name] for name in tensors}


def _separate(action: Action) -> list[str]:
    """The GeneralLinear groups that share no block with another non-compact group, and have rows on both sides."""
    owners: dict[tuple[str, int], list[str]] = {}
    for name, group in action.groups.items():
        if isinstance(group, GeneralLinear | PositiveScaling | Rotary):
            for block in action.blocks(name):
                owners.setdefault((block.parameter, block.index), []).append(name)
    shared = {name for names in owners.values() if len(set(names)) > 1 for name in names}
    linear = [name for name, group in action.groups.items() if isinstance(group, GeneralLinear)]
    return [name for name in linear if name not in shared and _two_sided(action, name)]


def _two_sided(action: Action, name: str) -> bool:
    return len({block.dual for block in action.blocks(name)}) == 2


def _orthonormal(plain: Tensor, other: Tensor) -> Tensor:
    """The element that makes the better conditioned side orthonormal: plain (..., m, n) and dual (..., k, n) rows.

    Where both sides have full rank the choice does not matter, because balancing has the last word.
    """
    roots = [_root(rows) for rows in (plain, other)]
    (a, condition), (b, other_condition) = roots
    use_dual = (other_condition >= condition)[..., None, None]
    return torch.where(use_dual, b, torch.linalg.inv(a))


def _root(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(rows^T rows)^(1/2), with 1 for what vanishes, and the ratio of its smallest to its largest eigenvalue."""
    size = rows.shape[-1]
    padding = rows.new_zeros(*rows.shape[:-2], max(0, size - rows.shape[-2]), size)
    _, s, vh = torch.linalg.svd(torch.cat([rows, padding], dim=-2), full_matrices=False)
    largest = s[..., :1]
    condition = torch.where(largest > 0, s / torch.where(largest > 0, largest, 1.0), 0.0)[..., -1]
    safe = torch.where(s > 1e-10 * largest, s, torch.where(largest > 0, largest, 1.0))
    return vh.mT @ (safe.unsqueeze(-1) * vh), condition
