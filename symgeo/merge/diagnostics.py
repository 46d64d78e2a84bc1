"""What a merge reports about every module: the method's own facts, and how well-posed the merge is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manifolds.linalg import balance, widen
from symgeo.merge.methods import MEANS
from symgeo.merge.overlaps import overlaps
from symgeo.merge.problem import ROUNDING, Factors, Problem, Solution

# what a method that is a closed form need not say
DEFAULTS: dict[str, Any] = {
    "converged": True, "iterations": 0, "objective": None, "gradient_norm": None, "fallback": None,
}  # fmt: skip
SMALL_GAP = 0.01  # below it the directions at the cut are not well determined
SMALL_COSINE = 0.1  # below it noise decides how two adapters are turned onto each other


def reports(problem: Problem, solution: Solution, method: str, factors: Sequence[Factors]) -> list[dict[str, Any]]:
    """One JSON-serialisable dictionary per module.

    ``method``, ``rank``
        the method asked for; R.
    ``converged``, ``iterations``, ``objective``, ``gradient_norm``
        of the iteration; the objective is ``sum_i w_i d_i^2``.  True, 0, None, None for a closed form.
    ``retained_energy``
        the share of the squared singular values of the untruncated merge that rank R keeps; for a mean at rank R the
        untruncated merge is taken to be the weighted sum of the deltas.
    ``spectral_gap``
        ``(sigma_R - sigma_{R+1}) / sigma_R`` of the same; 1 where nothing is cut.
    ``overlap``, ``principal_angles``
        the largest ``|cos|`` between two deltas; the smallest and largest principal angle in degrees over all pairs
        of adapters, between their column spaces and between their row spaces.  None where there is no pair.
    ``gauge_condition``
        the largest condition number of the ``G`` in ``B_i = B G^-1, A_i = G A`` with ``B, A`` balanced.
    ``warnings``, ``fallback``
        a list of sentences; None, or ``{"method": .., "reason": ..}`` where another method had to be used.
    """
    spectrum = _normalised(solution.spectrum, problem.magnitude())
    columns: dict[str, Tensor] = {
        "retained_energy": _retained_energy(spectrum, problem.rank),
        "spectral_gap": _spectral_gap(spectrum, problem.rank),
        "gauge_condition": _gauge_condition(factors),
        **overlaps(problem),
        **{f"rank {i}": ranks for i, ranks in enumerate(problem.ranks())},
        **{name: fact for name, fact in solution.facts.items() if isinstance(fact, Tensor)},
    }
    listed = {name: fact for name, fact in solution.facts.items() if not isinstance(fact, Tensor)}
    rows = []
    for i, values in enumerate(_read(columns)):
        values |= {name: fact[i] for name, fact in listed.items()}
        rows.append(_row(problem, method, values))
    return rows


def _read(columns: dict[str, Tensor]) -> list[dict[str, Any]]:
    """All columns as Python numbers, module by module, by one transfer; NaN and infinity become None."""
    table = torch.stack([column.to(torch.float64) for column in columns.values()], dim=-1).tolist()
    dtypes = [column.dtype for column in columns.values()]
    return [{name: _plain(x, dtype) for name, x, dtype in zip(columns, row, dtypes)} for row in table]


def _plain(value: float, dtype: torch.dtype) -> float | int | bool | None:
    if not math.isfinite(value):
        return None
    return value if dtype.is_floating_point else bool(value) if dtype == torch.bool else int(value)


def _row(problem: Problem, method: str, values: dict[str, Any]) -> dict[str, Any]:
    ranks = [values.pop(f"rank {i}") for i in range(len(problem.adapters))]
    angles = {side: [values.pop(f"{side} {size}") for size in ("smallest", "largest")] for side in ("columns", "rows")}
    known = angles["columns"][0] is not None
    alignment, own = values.pop("alignment"), values.pop("warnings", [])
    row = {"method": method, "rank": problem.rank, **DEFAULTS, **values}
    row["principal_angles"] = angles if known else None
    row["warnings"] = [*_warnings(row, ranks, alignment), *own]
    return row


def _warnings(row: dict[str, Any], ranks: list[int], alignment: float | None) -> list[str]:
    """What the reader should know before trusting a merge."""
    rank, found = row["rank"], []
    if row["fallback"] is not None:
        found.append(f"merged by {row['fallback']['method']} instead: {row['fallback']['reason']}")
    if not row["converged"]:
        size = "" if row["gradient_norm"] is None else f": the gradient still has norm {row['gradient_norm']:.1e}"
        found.append(f"not converged after {row['iterations']} iterations{size}")
    if row["spectral_gap"] < SMALL_GAP:
        found.append(
            f"the singular values {rank} and {rank + 1} of the merge are nearly tied (relative gap "
            f"{row['spectral_gap']:.1e}): which directions are kept is not well determined; take another rank"
        )
    if row["method"] in MEANS and rank < sum(ranks) and alignment is not None and alignment < SMALL_COSINE:
        found.append(
            f"balanced factors are nearly orthogonal (smallest cosine {alignment:.1e}): the mean at rank {rank} is "
            'not well determined; bures with rank="sum" lifts it, and tsvd needs no alignment'
        )
    found += [f"adapter {i} is zero" for i, r in enumerate(ranks) if r == 0]
    return found


def _normalised(spectrum: Tensor, magnitude: Tensor) -> Tensor:
    """The singular values beside the largest, without those that are rounding error of the adapters' size."""
    largest = spectrum.amax(-1, keepdim=True)
    real = spectrum > ROUNDING * torch.maximum(largest, magnitude.unsqueeze(-1))
    return torch.where(real, spectrum / torch.where(largest > 0, largest, 1.0), 0.0)


def _retained_energy(s: Tensor, rank: int) -> Tensor:
    energy = s.square()
    total = energy.sum(-1)
    return torch.where(total > 0, energy[..., :rank].sum(-1) / torch.where(total > 0, total, 1.0), 1.0)


def _spectral_gap(s: Tensor, rank: int) -> Tensor:
    if s.shape[-1] <= rank:
        return torch.ones_like(s[..., 0])
    last = s[..., rank - 1]
    return torch.where(last > 0, 1 - s[..., rank] / torch.where(last > 0, last, 1.0), 1.0)


def _gauge_condition(factors: Sequence[Factors]) -> Tensor:
    """The largest condition number of a balancing gauge, infinite where no adapter of a module has one."""
    found = [torch.full(factors[0][0].shape[:1], -torch.inf, dtype=torch.float64, device=factors[0][0].device)]
    for b, a in factors:
        if b.shape[-1] > min(b.shape[-2], a.shape[-1]):
            continue  # more columns than the product can have rank: many gauges balance it
        balanced = balance(widen(b.detach()), widen(a.detach()).mT)
        singular = torch.linalg.svdvals(balanced.gauge)
        found.append(torch.where(balanced.deficient, -torch.inf, singular[..., 0] / singular[..., -1]))
    return torch.stack(found).amax(0)
