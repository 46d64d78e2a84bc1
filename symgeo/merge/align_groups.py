"""What an alignment needs to know of each group: the gauge that balances it, and its best compact element.

With the cross products ``C[a, b] = sum_r S[r, a] conj(T[r, b])`` of source and target rows, the compact element
that brings the source closest to the target maximises a linear function of C:

    group             compact part   best element                 gain
    Permutation       itself         linear assignment            its value
    SignFlip          itself         sign C[a, a]                 sum_a |C[a, a]|
    Orthogonal, GL    O(n)           polar(C)^T                   nuclear norm
    Rotary            phases         conj(C[a, a]) / |C[a, a]|    sum_a |C[a, a]|
    PositiveScaling        1                       -                             -
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from manifolds.linalg import balance, gram, polar
from symgeo.errors import SymmetryError
from symgeo.groups import Cyclic, GeneralLinear, Group, Orthogonal, Permutation, PositiveScaling, Rotary, SignFlip


@dataclass(frozen=True)
class Compact:
    """The compact part of a group.

    square : whether it mixes coordinates, so that C has two axes ``(..., n, n)``, or only its diagonal ``(..., n)``;
    best : C -> the element with the largest gain;  gain : C -> that gain ``(...)``.
    """

    square: bool
    best: Callable[[Tensor], Tensor]
    gain: Callable[[Tensor], Tensor]


def assignment(scores: Tensor) -> Tensor:
    """The permutation ``p`` with the largest ``sum_j scores[p[j], j]``, ``(..., n, n) -> (..., n)``.

    >>> assignment(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    tensor([1, 0])
    """
    flat = scores.detach().cpu().reshape(-1, *scores.shape[-2:]).numpy()
    columns = [torch.from_numpy(linear_sum_assignment(one, maximize=True)[1]) for one in flat]
    found = torch.stack(columns) if columns else torch.empty(0, scores.shape[-1], dtype=torch.long)
    return found.argsort(-1).reshape(scores.shape[:-1]).to(scores.device)


def _assigned(scores: Tensor) -> Tensor:
    return scores.gather(-2, assignment(scores).unsqueeze(-2)).sum((-2, -1))


def _phase(c: Tensor) -> Tensor:
    size = c.abs()
    return torch.where(size > 0, c.conj() / torch.where(size > 0, size, 1.0), torch.ones_like(c))


def _shift_sums(c: Tensor) -> Tensor:
    """``sum_a C[a, a + k]`` for every shift k, (..., n, n) -> (..., n)."""
    start = torch.arange(c.shape[-1], device=c.device)
    return c.gather(-1, ((start.unsqueeze(-1) + start) % len(start)).expand(c.shape)).sum(-2)


def _modulus_sum(c: Tensor) -> Tensor:
    return c.abs().sum(-1)


_ROTATION = Compact(True, lambda c: polar(c).mT, lambda c: torch.linalg.svdvals(c).sum(-1))
_COMPACT: dict[type[Group], Compact | None] = {
    Permutation: Compact(True, assignment, _assigned),
    SignFlip: Compact(False, lambda c: torch.where(c < 0, -1.0, 1.0).to(c.dtype), _modulus_sum),
    Orthogonal: _ROTATION,
    GeneralLinear: _ROTATION,
    Rotary: Compact(False, _phase, _modulus_sum),
    Cyclic: Compact(True, lambda c: _shift_sums(c).argmax(-1), lambda c: _shift_sums(c).amax(-1)),
    PositiveScaling: None,
}


def compact_part(name: str, group: Group) -> Compact | None:
    """The compact part of a group, None where that is trivial.

    Raises ``SymmetryError`` for a group of a kind that is not known here.
    """
    if type(group) not in _COMPACT:
        known = ", ".join(kind.__name__ for kind in _COMPACT)
        raise SymmetryError(f"group {name!r}: models are aligned over {known}; found {type(group).__name__}")
    return _COMPACT[type(group)]


def coordinates(group: Group, rows: Tensor) -> Tensor:
    """Rows ``(..., m, n)`` in the coordinates of the compact part: the complex planes of a rotary group."""
    if not isinstance(group, Rotary):
        return rows
    if group.pairing == "half":
        return torch.complex(*(part.contiguous() for part in rows.chunk(2, dim=-1)))
    return torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous())


def balancing(name: str, group: Group, plain: Tensor, dual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The element that gives plain and dual rows, ``(*copies, m, n)`` each, equal Gram matrices.

    Returns it with the imbalance before it, ``|plain^T plain - dual^T dual| / (|plain|^2 + |dual|^2)``, and the
    mask of copies without such a gauge (deficient, see :func:`manifolds.linalg.balance`); both ``(*copies)``, and
    ``(*copies, n)`` for a group that acts on each coordinate.  A PositiveScaling with plain (or dual) rows alone
    has the gauge of root mean square 1.

    Raises ``SymmetryError`` for any other group with one side only.
    """
    if not (plain.shape[-2] and dual.shape[-2]):
        if not isinstance(group, PositiveScaling):
            sides = (name, f"{name}*") if plain.shape[-2] else (f"{name}*", name)
            raise SymmetryError(f"group {name!r}: {sides[0]!r} is declared, but nothing carries {sides[1]!r}")
        return _unit_size(plain, dual)
    if not isinstance(group, GeneralLinear):
        plain, dual = (_lengths(coordinates(group, rows)) for rows in (plain, dual))
    gram_plain, gram_dual = gram(plain), gram(dual)
    total = _norm(plain).square() + _norm(dual).square()
    imbalance = _norm(gram_plain - gram_dual) / total.clamp_min(torch.finfo(total.dtype).tiny)
    found = balance(dual, plain)
    if isinstance(group, GeneralLinear):
        return found.gauge, imbalance, found.deficient
    size = found.gauge[..., 0, 0].abs()
    part = torch.complex(size, torch.zeros_like(size)) if isinstance(group, Rotary) else size
    return part, imbalance, found.deficient


def _lengths(rows: Tensor) -> Tensor:
    """The length of every column as a pair of its own: ``(..., m, n) -> (..., n, 1, 1)``."""
    return torch.linalg.vector_norm(rows, dim=-2)[..., None, None]


def _unit_size(plain: Tensor, dual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.cat([plain, dual], dim=-2)
    size = rows.square().mean(-2).sqrt()
    deficient = size == 0
    size = torch.where(deficient, 1.0, size)
    return 1 / size if plain.shape[-2] else size, (1 - size).abs(), deficient


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1))
