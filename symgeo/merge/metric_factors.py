"""Merging low-rank updates under metrics that are Kronecker products: RegMean and its two-sided generalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manifolds.linalg import widen
from manifolds.low_rank import LowRank, svd_of_product, truncate
from symgeo.merge.factors import MergedFactors
from symgeo.merge.kronecker import KroneckerMean, Spectrum, System, check_metrics, kronecker_mean
from symgeo.merge.metrics import KroneckerMetric
from symgeo.merge.problem import Factors, check_factors, check_weights, output_rank, reduce


@torch.no_grad()
def regmean_factors(
    factors: Sequence[Factors],
    grams: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    rank: int | str = "max",
) -> MergedFactors:
    """RegMean (arXiv 2212.09849) of updates ``Delta_i = B_i A_i``, cut to rank R, without forming an ``m x n`` matrix.

        ``W = (sum_i w_i Delta_i C_i) C^-1 = [B_1 .. B_N] [w_1 A_1 C_1 C^-1; ..; w_N A_N C_N C^-1]``,
        ``C = sum_i w_i C_i``

    factors : ``B_i (m, r_i)``, ``A_i (r_i, n)``;  grams : ``C_i = X_i^T X_i (n, n)`` of the layer's inputs, all sums or
    all means over examples;  weights : ``>= 0``, normalised;  rank : as in ``merge_factors``.

    The cut is the best one in the norm ``|X C^(1/2)|``, which makes the result the minimiser of RegMean's own objective
    ``sum_i w_i |(X - Delta_i) C_i^(1/2)|^2`` among matrices of rank R (derived here): its distance from ``W`` in that
    norm is all that X can still change.  Inputs that no adapter has seen (null directions of ``C``) are mapped to zero.

    Raises ``ValueError`` for factors, Gram matrices or weights that do not fit.
    """
    wanted, chosen = _checked(factors, [KroneckerMetric(None, gram) for gram in grams], weights, rank)
    total = Spectrum.of(torch.stack([w * widen(c) for w, c in zip(chosen, grams)]).sum(0), "the sum of the grams")
    b = torch.cat([widen(b) for b, _ in factors], dim=-1)
    a = torch.cat([w * widen(a) @ widen(c) for w, (_, a), c in zip(chosen, factors, grams)], dim=-2)
    whole = svd_of_product(b, total.power(-0.5, a.mT).mT)
    left, right = truncate(whole, wanted).factors()
    return _merged("regmean", left, total.power(-0.5, right.mT).mT, whole.s, factors[0], None)


@torch.no_grad()
def kronecker_factors(
    factors: Sequence[Factors],
    metrics: Sequence[KroneckerMetric],
    weights: Sequence[float] | None = None,
    rank: int | str = "max",
    tol: float = 1e-10,
) -> MergedFactors:
    """The mean of updates ``B_i A_i`` under Kronecker metrics, among the matrices in the adapters' spans.

    factors : ``B_i (m, r_i)``, ``A_i (r_i, n)``;  metrics : one per adapter;  weights : ``>= 0``, normalised;  rank :
    as in ``merge_factors``.  With orthonormal bases Q of all columns and P of all rows the mean is sought as
    ``Q X P^T``: the system of :func:`kronecker_mean` with ``Q^T L_i Q`` and ``P^T R_i P`` (Galerkin, derived here).
    The unrestricted minimiser has full rank in general; where ``L_i = I``, :func:`regmean_factors` has it exactly.

    The cut to rank R is the best one in the norm of ``(sum_i w_i L_i) (x) (sum_i w_i R_i)``, so that the result is
    equivariant as the mean is; directions that no metric sees are dropped.

    Raises ``ValueError`` for factors, metrics or weights that do not fit.
    """
    wanted, chosen = _checked(factors, metrics, weights, rank)
    problem = reduce([(b[None], a[None]) for b, a in factors], chosen, wanted, [0])
    left, right = problem.left[0], problem.right[0]
    inside = [metric.restrict(left, right) for metric in metrics]
    deltas = [problem.delta(i)[0] for i in range(len(factors))]
    mean = kronecker_mean(deltas, inside, chosen, tol)
    system = System.of(deltas, inside, chosen)
    u, s, vh = torch.linalg.svd(system.right.power(0.5, system.left.power(0.5, mean.point).mT).mT, full_matrices=False)
    b, a = truncate(LowRank(u, s, vh.mT), wanted).factors()
    b, a = left @ system.left.power(-0.5, b), (right @ system.right.power(-0.5, a.mT)).mT
    return _merged("kronecker", b, a, s, factors[0], mean)


def _checked(
    factors: Sequence[Factors],
    metrics: Sequence[KroneckerMetric],
    weights: Sequence[float] | None,
    rank: int | str,
) -> tuple[int, list[float]]:
    """The wanted rank and the normalised weights."""
    check_factors(factors, 2)
    check_metrics([(b.shape[0], a.shape[1]) for b, a in factors], metrics)
    ranks = [b.shape[1] for b, _ in factors]
    wanted = output_rank(rank, ranks, factors[0][0].shape[0], factors[0][1].shape[1])
    return min(wanted, sum(ranks)), check_weights(weights, len(factors), mean=True)


def _merged(method: str, b: Tensor, a: Tensor, s: Tensor, like: Factors, mean: KroneckerMean | None) -> MergedFactors:
    """The factors in the dtype of the input, and what there is to say; energies are those of the metric's norm."""
    rank, energy = b.shape[-1], s.square()
    following = float(s[rank]) if rank < s.shape[-1] else 0.0
    report: dict[str, Any] = {
        "method": method,
        "rank": rank,
        "converged": mean is None or bool(mean.converged),
        "iterations": 0 if mean is None else int(mean.iterations),
        "residual": None if mean is None else float(mean.residual),
        "retained_energy": float(energy[:rank].sum() / energy.sum()) if float(energy.sum()) > 0 else 1.0,
        "spectral_gap": 1.0 - following / float(s[rank - 1]) if float(s[rank - 1]) > 0 else 0.0,
        "warnings": [],
        "fallback": None,
    }
    if not report["converged"]:
        report["warnings"].append(
            f"the system of the mean was solved to {report['residual']:.1e} only: the metrics are close to singular"
        )
    return MergedFactors(b.to(like[0].dtype), a.to(like[1].dtype), report)
