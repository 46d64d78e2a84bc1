"""Methods that edit singular values and vectors: TSV-M and Iso-C, in core coordinates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifolds.low_rank import LowRank
from symgeo.merge.problem import ROUNDING, Problem, Solution, present
from symgeo.merge.sums import cut

# below this the smallest direction of the concatenated vectors is amplified more than a hundred million times
_PARALLEL = 1e-8


def iso(problem: Problem) -> Solution:
    """Iso-C (arXiv 2502.04959): ``X = mean(s_1 .. s_R) U_R V_R^T`` with ``U S V^T = sum_i w_i Delta_i``.

    The paper flattens all singular values of a full matrix.  Here those of the sum cut to rank R, so that the nuclear
    norm of what is kept stays the same; directions whose singular value is zero to rounding are left out, or they
    would be noise of full size.  ``spectrum`` is that of the sum, before it is flattened.
    """
    solution = cut(problem.weighted_sum(), problem.rank)
    u, s, v = solution.merged
    sizes = torch.stack([abs(w) * adapter.s[..., 0] for w, adapter in zip(problem.weights, problem.adapters)])
    kept = s > ROUNDING * sizes.amax(0).unsqueeze(-1)
    level = (s * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1)
    return Solution(LowRank(u, level * kept, v), solution.spectrum)


def tsv(problem: Problem) -> Solution:
    """TSV-M (arXiv 2412.00081): ``X = orth([U_1 .. U_N]) diag(w_1 S_1, .., w_N S_N) orth([V_1 .. V_N])^T``.

    ``U_i S_i V_i^T`` are the leading ``k_i`` components of adapter i and ``orth`` is the polar factor, which makes the
    singular vectors of different tasks orthogonal.  The paper gives each task the share ``1 / N`` of the rank of a
    full matrix; an adapter of rank ``r_i`` gets its share of the wanted rank, ``k_i = ceil(R r_i / sum_j r_j)``: all
    of it for ``rank="sum"``, and the same whatever the order of the adapters.  The result is then cut to rank R.

    Where singular vectors of different tasks are linearly dependent the polar factor does not exist: the partial
    isometry on their span takes its place.  Modules where they are, or nearly so, are named in the warnings.
    """
    ranks = [adapter.s.shape[-1] for adapter in problem.adapters]
    shares = [min(r, math.ceil(problem.rank * r / sum(ranks))) for r in ranks]
    parts = []
    for (u, s, v), share in zip(problem.adapters, shares):
        kept = present(s)[..., :share]  # a direction of singular value zero is noise
        parts.append((u[..., :share] * kept.unsqueeze(-2), s[..., :share] * kept, v[..., :share] * kept.unsqueeze(-2)))
    left, left_conditions = _orthonormal(torch.cat([u for u, _, _ in parts], dim=-1))
    right, right_conditions = _orthonormal(torch.cat([v for _, _, v in parts], dim=-1))
    values = torch.cat([w * s for w, (_, s, _) in zip(problem.weights, parts)], dim=-1)
    solution = cut((left * values.unsqueeze(-2)) @ right.mT, problem.rank)
    notes = [_note(min(x, y)) for x, y in zip(left_conditions.tolist(), right_conditions.tolist())]
    return Solution(solution.merged, solution.spectrum, {"warnings": notes})


def _orthonormal(x: Tensor) -> tuple[Tensor, Tensor]:
    """The polar factor of ``x (..., k, q)`` on the directions where it is not zero, and its smallest relative value.

    Columns that are zero stay zero.  The second value is ``(...)``: 0 for dependent columns, 1 for orthonormal ones.
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = s > _PARALLEL * s[..., :1]
    count = torch.linalg.vector_norm(x, dim=-2).count_nonzero(-1).clamp(1, s.shape[-1])
    smallest, largest = s.gather(-1, (count - 1).unsqueeze(-1)).squeeze(-1), s[..., 0]
    return (u * kept.unsqueeze(-2)) @ vh, torch.where(largest > 0, smallest / largest.where(largest > 0, 1.0), 1.0)


def _note(condition: float) -> list[str]:
    if condition >= 1e-6:
        return []
    return [
        f"tsv: singular vectors of different adapters are parallel (to {condition:.0e}), so that making them "
        "orthogonal is ill-posed"
    ]
