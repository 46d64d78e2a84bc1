"""True Fréchet means in the quotient geometries of factor pairs, with another method where there is none.

An adapter of full rank r is a point of :class:`manifolds.FactorPair`, pairs ``(B, A^T)`` modulo GL(r); both of its
metrics see Gram matrices only, so core coordinates lose nothing.  The mean is that of :func:`manifolds.frechet_mean`:
geodesics and logarithms are not replaced by chords (arXiv 2604.27155 defines merges by such means; the algorithm is
derived here).
"""

from __future__ import annotations

import torch
from torch import Tensor

from manifolds import FactorPair, frechet_mean
from manifolds.low_rank import LowRank, svd_of_product
from symgeo.merge.problem import ROUNDING, Problem, Solution
from symgeo.merge.sums import cut

FALLBACK = "tsvd"  # the mean of the chordal distance: it exists for all adapters


def geodesic_mix(problem: Problem) -> Solution:
    """The mean for the metric ``|xi_B A|_F^2 + |B xi_A|_F^2``; arithmetic in commuting singular values.

    See :func:`geodesic_mean` for what happens where there is no mean.
    """
    return geodesic_mean(problem, "mix")


def geodesic_inv(problem: Problem) -> Solution:
    """The mean for ``Tr (B^T B)^-1 xi_B^T xi_B + Tr (A A^T)^-1 xi_A xi_A^T``; geometric in commuting singular values.

    See :func:`geodesic_mean` for what happens where there is no mean.
    """
    return geodesic_mean(problem, "inv")


def geodesic_mean(problem: Problem, metric: str) -> Solution:
    """``argmin_X sum_i w_i d(X, Delta_i)^2`` among the matrices of rank r, starting at their truncated mean.

    All adapters with a weight must have one rank r, equal to the rank asked for, and be close enough for their
    logarithms at the start to exist: at distance infinity are adapters of lower rank, and (for ``r = m`` or
    ``r = n``) those of opposite sign.  A module without a mean gets the method of :data:`FALLBACK` instead, and its
    ``fallback`` says so, with the reason.  A mean whose iteration stopped early has ``converged`` False.
    """
    start = cut(problem.weighted_sum(), problem.rank)
    reasons = _obstacles(problem, start.merged)
    possible = torch.tensor([reason is None for reason in reasons], device=problem.left.device)
    nothing = torch.full_like(problem.left[:, 0, 0], torch.nan)
    facts: dict[str, Tensor] = {"objective": nothing, "gradient_norm": nothing.clone()}
    facts |= {"converged": torch.ones_like(possible), "iterations": torch.zeros_like(nothing, dtype=torch.int64)}
    merged = start.merged
    if bool(possible.any()):
        merged = _means(problem, metric, merged, possible, facts, reasons)
    fallback = [None if reason is None else {"method": FALLBACK, "reason": reason} for reason in reasons]
    return Solution(merged, start.spectrum, {**facts, "fallback": fallback})


def _obstacles(problem: Problem, start: LowRank) -> list[str | None]:
    """Per module why there is no mean at the wanted rank; None where nothing is known to stand against it."""
    kept = [i for i, w in enumerate(problem.weights) if w > 0]
    sizes = sorted({problem.adapters[i].s.shape[-1] for i in kept})
    if sizes != [problem.rank]:
        reason = f"rank {problem.rank} was asked for; a geodesic mean has the one rank of all adapters, which is "
        return [reason + " and ".join(str(size) for size in sizes)] * problem.modules
    remaining = (start.s > ROUNDING * problem.magnitude().unsqueeze(-1)).sum(-1)
    others = [problem.adapters[i] for i in kept]
    opposite = torch.stack([_opposite(start, other) for other in others])
    aligned = torch.stack([_aligned(start, other) for other in others])
    facts = torch.cat([problem.ranks()[kept], opposite, aligned, remaining.unsqueeze(0)])
    return [_obstacle(kept, row, problem.rank) for row in facts.T.tolist()]


def _obstacle(kept: list[int], facts: list[int], rank: int) -> str | None:
    ranks, opposite, aligned = (facts[k * len(kept) : (k + 1) * len(kept)] for k in range(3))
    for i, own in zip(kept, ranks):
        if own < rank:
            return f"adapter {i} has rank {own} instead of {rank}"
    if facts[-1] < rank:
        return f"the weighted sum of the adapters has rank {facts[-1]}, so that there is no start"
    for i, differs, fits in zip(kept, opposite, aligned):
        if differs:
            return f"the signs of the determinants of adapter {i} and of the weighted sum differ: no curve joins them"
        if not fits:
            return f"adapter {i} is orthogonal to the truncated weighted sum, so that it cannot be aligned with it"
    return None


def _opposite(x: LowRank, y: LowRank) -> Tensor:
    """Whether two invertible matrices have determinants of different sign; False for other shapes."""
    if not x.u.shape[-1] == x.u.shape[-2] == x.v.shape[-2]:
        return torch.zeros_like(x.s[..., 0], dtype=torch.bool)
    return torch.linalg.det(x.u.mT @ y.u) * torch.linalg.det(x.v.mT @ y.v) < 0


def _aligned(x: LowRank, y: LowRank) -> Tensor:
    """Whether the closest rotation of balanced factors is determined by more than rounding error."""
    return torch.linalg.svdvals(0.5 * (x.u.mT @ y.u + x.v.mT @ y.v))[..., -1] > 1e-9


def _means(
    problem: Problem, metric: str, start: LowRank, possible: Tensor, facts: dict[str, Tensor], reasons: list[str | None]
) -> LowRank:
    """The means of the modules where one is ``possible``; fills in their facts, or the reason for a fallback."""
    rows = problem.left.shape[-1]
    kept = [i for i, w in enumerate(problem.weights) if w > 0]
    points = torch.stack([problem.balanced(i)[possible] for i in kept])
    weights = [problem.weights[i] for i in kept]
    first = torch.cat([start.u, start.v], dim=-2) * start.s.sqrt().unsqueeze(-2)
    mean = frechet_mean(FactorPair(rows, metric), points, weights, start=first[possible])
    result, where = mean.per_problem, possible.nonzero().squeeze(-1)
    exists = torch.isfinite(result.gradient_norm)
    for name in facts:
        facts[name][where[exists]] = getattr(result, name)[exists].to(facts[name].dtype)
    for module in where[~exists].tolist():
        reasons[module] = "no geodesic to every adapter was found: they are too far apart for this metric"
    found = svd_of_product(mean.point[..., :rows, :], mean.point[..., rows:, :].mT)
    return LowRank(*(old.index_put((where[exists],), new[exists]) for old, new in zip(start, found)))
