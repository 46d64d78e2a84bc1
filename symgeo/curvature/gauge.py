"""The balanced gauge: the point on a non-compact orbit at which the two sides of every group weigh the same."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from manifolds import linalg
from symgeo.curvature.abelian import Planes
from symgeo.errors import SymmetryError
from symgeo.functional import Params
from symgeo.groups import GeneralLinear, Group, PositiveScaling, Rotary
from symgeo.symmetry import Action, Element, Symmetry

#: balancing coupled groups in turn stops when no gauge differs from 1 by more, or after so many rounds
_CLOSE, _ROUNDS = 1e-13, 1000


def balance(symmetry: Symmetry, params: Mapping[str, Tensor]) -> tuple[Params, Element]:
    r"""The parameters in the balanced gauge, and the element that takes them there.

    A group that maps the plain rows ``P -> P A^T`` and the dual rows ``D -> D A^-1`` is balanced where

        P^T P = D^T D   (GeneralLinear),     |P_i| = |D_i|   (PositiveScaling; Rotary, for every plane i),

    the points of least norm on the orbit.  They differ by an element of the maximal compact subgroup only, so that
    averages over it do not depend on the representative.  For one GeneralLinear group the gauge is the symmetric
    positive ``A = ((P^T P)^-1 # (D^T D))^(1/2)``, computed from thin factors; balanced parameters stay where they
    are.  Groups that share a block are balanced in turn until nothing moves (1000 rounds; a RuntimeWarning says if
    that was not enough), which reads one number from the device in every round.  Other groups, shifts and flows
    contribute the identity.

    A pair whose product is zero (LoRA with B = 0) has no balanced gauge, its orbit being unbounded in both
    directions: it is left as it is.  A pair that is rank-deficient otherwise is balanced after rows of relative
    size 1e-5 have been appended, which keeps the gauge finite and invertible.

    Returns (balanced, element) with ``symmetry.bind(params).act(element, params)`` equal to balanced.
    Raises SymmetryError for a group that has rows on one side only.

    >>> lora = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})
    >>> balanced, _ = balance(lora, {"B": torch.full((3, 1), 4.0), "A": torch.ones(1, 3)})
    >>> balanced
    {'B': tensor([[2.],
            [2.],
            [2.]]), 'A': tensor([[2., 2., 2.]])}
    """
    action = symmetry.bind(params)
    element = Element(_gauges(action, params))
    return dict(action.act(element, params)), element


def dual(action: Action, element: Mapping[str, Tensor]) -> Element:
    """The element A^-T that moves gradients where A moves parameters."""
    return Element({name: _dual(action.groups[name], g) for name, g in element.items()})


def _dual(group: Group, g: Tensor) -> Tensor:
    inverse = group.inverse(g)
    return inverse.mT if isinstance(group, GeneralLinear) else inverse.conj().resolve_conj()


def _gauges(action: Action, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The balancing element of every non-compact group, in double precision."""
    names = [n for n, g in action.groups.items() if isinstance(g, GeneralLinear | PositiveScaling | Rotary)]
    point: Params = {name: linalg.widen(x.detach()) for name, x in params.items()}
    gauges: dict[str, Tensor] = {}
    rounds = _rounds(action, names)
    if len(rounds) <= 1:
        return _balancing(action, names, point, first=True) if names else {}
    for number in range(_ROUNDS):
        changes: list[Tensor] = []
        for together in rounds:
            steps = _balancing(action, together, point, first=number == 0)
            point = action.act(Element(steps), point)
            for name, step in steps.items():
                gauges[name] = action.groups[name].compose(step, gauges[name]) if name in gauges else step
                changes.append(_distance(action, name, step))
        change = float(torch.stack(changes).max())  # the only thing that is read, once in every round
        if change <= _CLOSE:
            return gauges
    warnings.warn(
        f"balance: after {_ROUNDS} rounds the gauges still move by {change:.0e}; some orbit may have no point"
        " of least norm", RuntimeWarning, stacklevel=3,
    )
    return gauges


def _distance(action: Action, name: str, step: Tensor) -> Tensor:
    one = action.groups[name].identity(action.sizes[name], action.copies[name], step.real.dtype, step.device)
    return (step - one).abs().max() if step.numel() else step.real.new_zeros(())


def _rounds(action: Action, names: list[str]) -> list[list[str]]:
    """The groups in as few rounds as a greedy choice finds, those in one round without a common block."""
    rounds: list[tuple[set[tuple[str, int]], list[str]]] = []
    for name in names:
        blocks = {(block.parameter, block.index) for block in action.blocks(name)}
        for taken, members in rounds:
            if not taken & blocks:
                taken |= blocks
                members.append(name)
                break
        else:
            rounds.append((blocks, [name]))
    return [members for _, members in rounds]


def _balancing(action: Action, names: list[str], point: Mapping[str, Tensor], first: bool) -> dict[str, Tensor]:
    """The gauges of groups that share no block; those of equal shapes in one call."""
    batches: dict[object, list[tuple[str, Tensor, Tensor]]] = {}
    for name in names:
        plain, other = action.stack(name, point)
        for side, missing in ((plain, name), (other, f"{name}*")):
            if not side.shape[-2]:
                raise SymmetryError(
                    f"group {name!r} acts on one side only: no parameter carries {missing!r}, so that no gauge"
                    " balances it; leave the group out"
                )
        plain, other = (linalg.widen(x).flatten(0, -3) if x.dim() > 2 else x[None] for x in (plain, other))
        key = (_rule(action.groups[name]), tuple(plain.shape[1:]), tuple(other.shape[1:]))
        batches.setdefault(key, []).append((name, plain, other))
    steps: dict[str, Tensor] = {}
    for batch in batches.values():
        plain, other = torch.cat([p for _, p, _ in batch]), torch.cat([d for _, _, d in batch])
        found = _gauge(action.groups[batch[0][0]], plain, other, first)
        for (name, *_), g in zip(batch, found.split([len(p) for _, p, _ in batch])):
            steps[name] = g.reshape(*action.copies[name], *g.shape[1:])
    return steps


def _rule(group: Group) -> tuple[type[Group], str]:
    """What decides how a group is balanced."""
    return type(group), group.pairing if isinstance(group, Rotary) else ""


def _gauge(group: Group, plain: Tensor, other: Tensor, first: bool) -> Tensor:
    """The gauge for plain (b, m, n) and dual (b, k, n) rows."""
    if isinstance(group, GeneralLinear):
        return _linear_gauge(plain, other, first)
    if isinstance(group, Rotary):
        planes = Planes(plain.shape[-1], group.pairing, complex=False)
        plain, other = planes.forward(plain)[0], planes.forward(other)[0]
    p, d = (torch.linalg.vector_norm(x, dim=-2) for x in (plain, other))
    empty = (p == 0) | (d == 0)
    scale = (torch.where(empty, 1.0, d) / torch.where(empty, 1.0, p)).sqrt()
    return scale.to(torch.complex128) if isinstance(group, Rotary) else scale


def _linear_gauge(plain: Tensor, other: Tensor, first: bool) -> Tensor:
    """The symmetric positive factor of the gauge of `manifolds.linalg.balance`; 1 where the product vanishes.

    A deficient pair is balanced in the first round only: it would never come to rest.
    """
    found = linalg.balance(other, plain)
    _, s, vh = torch.linalg.svd(found.gauge)
    positive = vh.mT @ (s.unsqueeze(-1) * vh)
    still = ~(plain != 0).any((-2, -1)) | ~(other != 0).any((-2, -1))
    if not first:
        still = still | found.deficient
    eye = torch.eye(plain.shape[-1], dtype=positive.dtype, device=positive.device)
    return torch.where(still[:, None, None], eye, positive)
