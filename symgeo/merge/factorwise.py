"""Methods that act on the factors themselves: no core coordinates, and no rank to cut to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from manifolds.linalg import widen
from manifolds.low_rank import weighted_sum
from symgeo.merge.problem import Factors


def cat(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The weighted sum exactly: ``B = [w_1 B_1 .. w_N B_N]``, ``A = [A_1; ..; A_N]``, of rank ``sum r_i``.

    Invariant under ``(B_i G^-1, G A_i)`` like the sum itself; weights of any sign.

    >>> one = torch.ones(1, 1)
    >>> b, a = cat([(one, one), (2 * one, one)], [1.0, -3.0]); tuple(b.shape), (b @ a).item()
    ((1, 2), -5.0)
    """
    return weighted_sum([(widen(b), widen(a)) for b, a in factors], weights)


def linear(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """``B = sum_i |w_i|^(1/2) B_i``, ``A = sum_i sign(w_i) |w_i|^(1/2) A_i``: PEFT's ``linear``, for comparison only.

    It is *not* invariant: ``(B_i G^-1, G A_i)`` is the same adapter and gives another merge.  It has the cross terms
    ``B_i A_j``, so that one adapter taken twice with weights 1/2 returns twice that adapter.  PEFT takes the root of
    ``w_i`` times the adapter's scaling, so it is reproduced when that scaling is split evenly over both factors.

    Raises ``ValueError`` for adapters of different ranks.

    >>> one = torch.ones(1, 1)
    >>> b, a = linear([(one, one), (one, one)], [0.5, 0.5]); round((b @ a).item(), 12)
    2.0
    """
    ranks = [b.shape[-1] for b, _ in factors]
    if len(set(ranks)) > 1:
        raise ValueError(
            f'method="linear" adds the factors, so it needs adapters of one rank; got ranks {ranks}.  '
            '"tsvd" and "cat", among others, accept different ones'
        )
    roots = [math.sqrt(abs(w)) for w in weights]
    b = torch.stack([root * widen(b) for root, (b, _) in zip(roots, factors)]).sum(0)
    a = torch.stack([math.copysign(root, w) * widen(a) for root, w, (_, a) in zip(roots, weights, factors)]).sum(0)
    return b, a
