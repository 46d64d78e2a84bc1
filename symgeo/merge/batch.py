"""One merge of a batch of modules of equal shape: from factors to factors, with a report per module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from manifolds.low_rank import svd_of_product
from symgeo.merge.diagnostics import reports
from symgeo.merge.methods import FACTORWISE, MEANS, METHODS, NAMES
from symgeo.merge.problem import (
    Factors,
    Problem,
    Solution,
    check_density,
    check_factors,
    check_weights,
    output_rank,
    reduce,
)


@dataclass(frozen=True)
class MergedBatch:
    """Merged factors ``B (modules, m, R)``, ``A (modules, R, n)`` in float64, and one report per module."""

    B: Tensor
    A: Tensor
    reports: list[dict[str, Any]]


@torch.no_grad()
def merge_batch(
    factors: Sequence[Factors],
    weights: Sequence[float] | None = None,
    method: str = "tsvd",
    rank: int | str = "max",
    scale: float = 1.0,
    seeds: Sequence[int] = (0,),
    density: float | None = None,
) -> MergedBatch:
    """Merges ``N`` adapters of several modules of one shape: ``B_i (modules, m, r_i)``, ``A_i (modules, r_i, n)``.

    ``seeds`` has one entry per module.  Meaning of the other arguments and errors: :func:`symgeo.merge.merge_factors`.
    """
    check_factors(factors, ndim=3)
    if method not in NAMES:
        raise ValueError(f"method must be one of {', '.join(NAMES)}; got {method!r}")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number; got {scale!r}")
    modules, rows = factors[0][0].shape[:2]
    if len(seeds) != modules or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds: needed one integer >= 0 for each of {modules} modules; got {list(seeds)}")
    chosen = check_weights(weights, len(factors), mean=method in MEANS)
    size = output_rank(rank, [b.shape[-1] for b, _ in factors], rows, factors[0][1].shape[-1])
    check_density(density)
    problem = replace(reduce(factors, chosen, size, seeds), density=density)
    if method in FACTORWISE:
        b, a = FACTORWISE[method](factors, chosen)
        problem, solution = replace(problem, rank=b.shape[-1]), Solution(found := svd_of_product(b, a), found.s)
        return MergedBatch(scale * b, a, reports(problem, solution, method, factors))
    solution = METHODS[method](problem)
    b, a = lift(problem, solution, scale)
    return MergedBatch(b, a, reports(problem, solution, method, factors))


def lift(problem: Problem, solution: Solution, scale: float) -> Factors:
    """``scale`` times the merge, as balanced factors ``B (modules, m, R)``, ``A (modules, R, n)`` of equal Grams."""
    merged, right = solution.merged, problem.right if solution.right is None else solution.right
    b, a = merged._replace(s=abs(scale) * merged.s).factors()
    missing = problem.rank - merged.s.shape[-1]
    b, a = math.copysign(1.0, scale) * (problem.left @ b), a @ right.mT
    return torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))
