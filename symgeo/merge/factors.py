"""``merge_factors``: the merge of one module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from symgeo.merge.batch import merge_batch
from symgeo.merge.problem import Factors, check_factors


@dataclass(frozen=True)
class MergedFactors:
    """Result of :func:`merge_factors`: the merged delta is ``B @ A``."""

    B: Tensor
    A: Tensor
    report: dict[str, Any]


def merge_factors(
    factors: Sequence[Factors],
    weights: Sequence[float] | None = None,
    method: str = "tsvd",
    rank: int | str = "max",
    scale: float = 1.0,
    seed: int = 0,
    density: float | None = None,
) -> MergedFactors:
    """Merges low-rank updates ``Delta_i = B_i A_i`` of one weight, ``B_i (m, r_i)``, ``A_i (r_i, n)``.

    ``(B_i G^-1, G A_i)`` is the same update for every invertible ``G``, and gives the same merge for all methods but
    ``linear``.  The methods and their equations: :mod:`symgeo.merge.methods`.  Everything is computed in float64 on
    factors with ``sum r_i`` columns; no ``m x n`` matrix is formed.

    weights : one number per update.  ``bures`` and ``geodesic-*`` are means: the numbers must be >= 0 and are
    normalised.  All other methods are sums: they are used as given, with any sign.  Default: ``1 / N`` each.
    rank : the rank R of the result, an integer, or ``"max"`` or ``"sum"`` of the ``r_i``; at most ``min(m, n)``.
    scale : the merged update is multiplied by it.  seed : for the method that draws (dare).
    density : share of the entries that ties, core, knots (default 0.2) and dare (0.5) keep.

    Where a geodesic mean does not exist (unequal ranks, R other than r, updates without full rank, too far apart or
    in opposite components) ``tsvd`` takes its place, and ``report["fallback"]`` says why.  Updates that are nearly
    orthogonal have no well-determined mean at rank R: the report warns; bures with ``rank="sum"`` lifts them.  All
    entries of the report: :func:`symgeo.merge.diagnostics.reports`.

    The result is balanced (``B^T B = A A^T``) except for cat and linear, has the promoted dtype of the inputs
    (float16 with bfloat16 gives float32), their device, and no gradient.

    Raises ``ValueError`` for factors that do not fit each other or are not finite, and for wrong weights, method,
    rank, scale, seed or density.

    >>> b, a = torch.tensor([[2.0], [0.0]]), torch.tensor([[3.0, 0.0]])
    >>> merged = merge_factors([(b, a), (0.5 * b, 2 / 3 * a)], method="bures")  # singular values 6 and 2
    >>> round((merged.B @ merged.A)[0, 0].item(), 4), merged.report["converged"]
    (3.7321, True)
    """
    check_factors(factors, ndim=2)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0; got {seed!r}")
    batch = merge_batch([(b[None], a[None]) for b, a in factors], weights, method, rank, scale, [seed], density)
    dtype = reduce(torch.promote_types, [x.dtype for pair in factors for x in pair])
    b, a = batch.B[0].to(dtype), batch.A[0].to(dtype)
    if not bool(torch.isfinite(b).all() & torch.isfinite(a).all()):
        raise ValueError(f"the merged factors overflow {dtype}, the dtype of the inputs; give float32 factors")
    return MergedFactors(b, a, batch.reports[0])
