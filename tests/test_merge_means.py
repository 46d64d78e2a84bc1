"""The Bures and the geodesic means against independent minimisations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from updates import (
    GEODESIC,
    METHODS,
    RANK,
    SPREAD,
    WEIGHTS,
    M,
    N,
    Pairs,
    balanced,
    change,
    commuting,
    delta,
    product,
    random,
    related,
    toy,
    unrelated,
)

from symgeo.merge import bures as bures_module
from symgeo.merge.factors import merge_factors

# ---- the Bures mean


def lifted(x: Tensor) -> Tensor:
    """The positive semidefinite ``[[(D D^T)^1/2, D], [D^T, (D^T D)^1/2]]`` of a dense delta."""
    z = balanced(x, RANK)
    return z @ z.mT


def bures_distance(p: Tensor, q: Tensor) -> float:
    """``Tr P + Tr Q - 2 Tr (P^1/2 Q P^1/2)^1/2`` by eigenvalues of dense matrices."""
    values, vectors = torch.linalg.eigh(p)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ q @ root).clamp_min(0).sqrt().sum()
    return float(p.trace() + q.trace() - 2 * cross)


def minimise(points: list[Tensor], weights: tuple[float, ...], z: Tensor) -> tuple[Tensor, float]:
    """L-BFGS on ``sum_i w_i (|Z_i|^2 + |Z|^2 - 2 |Z_i^T Z|_*)``."""
    z = z.clone().requires_grad_()

    def loss() -> Tensor:
        each = [p.square().sum() + z.square().sum() - 2 * torch.linalg.matrix_norm(p.mT @ z, "nuc") for p in points]
        return torch.stack([w * d for w, d in zip(weights, each)]).sum()

    optimizer = torch.optim.LBFGS([z], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, history_size=50,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return z.detach(), loss().item()


@pytest.mark.parametrize("rank", [1, 3, 4, 10])
def test_the_bures_mean_is_a_minimum(rank):
    """Against L-BFGS from the same start; and the objective at random points, the inputs and the start."""
    pairs = unrelated(2, 5, 3)
    merged = merge_factors(pairs, WEIGHTS, "bures", rank)
    assert merged.report["converged"] and 0 < merged.report["iterations"] < 500
    points = [balanced(b @ a, b.shape[1]) for b, a in pairs]
    start = balanced(delta(pairs, "tsvd", rank=rank), rank)
    z, value = minimise(points, WEIGHTS, start)
    assert merged.report["objective"] == pytest.approx(value, rel=1e-9)
    assert change(product(merged), z[:M] @ z[M:].mT) <= 1e-6  # L-BFGS stops where its line search sees no descent

    def objective(point: Tensor) -> float:
        return sum(w * bures_distance(point @ point.mT, p @ p.mT) for w, p in zip(WEIGHTS, points))

    assert objective(z) == pytest.approx(merged.report["objective"], rel=1e-6)
    others = [z + 0.1 * random(50 + i, M + N, rank) for i in range(50)] + [start]
    others += [balanced(b @ a, min(rank, b.shape[1])) for b, a in pairs]
    assert min(objective(other) for other in others) >= merged.report["objective"] * (1 - 1e-9)


def test_bures_objective_is_the_sum_of_squared_distances():
    pairs = related(0.2)
    report = merge_factors([pairs[0], pairs[1]], (1.0, 0.0), "bures").report
    assert report["objective"] == pytest.approx(0.0, abs=1e-10)
    values = torch.tensor([[5.0, 3.0, 1.2], [4.0, 2.0, 0.7]], dtype=torch.float64)
    pairs, _, _ = commuting(values)
    merged = merge_factors(pairs, (0.25, 0.75), "bures")
    p = lifted(product(merged))  # commuting: the mean is balanced
    expected = sum(w * bures_distance(p, lifted(b @ a)) for w, (b, a) in zip((0.25, 0.75), pairs))
    assert merged.report["objective"] == pytest.approx(expected, abs=1e-6)
    shift = (values[0].sqrt() - values[1].sqrt()).square().sum()
    assert merged.report["objective"] == pytest.approx(float(2 * 0.25 * 0.75 * shift), rel=1e-12)


@pytest.mark.parametrize("rank", range(1, 12))
def test_every_rank_of_the_bures_mean(rank):
    merged = merge_factors(unrelated(2, 5, 3), WEIGHTS, "bures", rank)
    assert merged.report["converged"] and merged.report["rank"] == rank
    assert merged.B.shape == (M, rank) and merged.A.shape == (rank, N)
    assert int(torch.linalg.matrix_rank(product(merged))) == min(rank, 5)  # 5: what the widest mean needs here


def test_a_larger_rank_never_worsens_the_bures_objective():
    values = [merge_factors(unrelated(2, 5, 3), WEIGHTS, "bures", r).report["objective"] for r in range(1, 11)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(values))


def test_nearly_orthogonal_adapters_converge_and_are_reported():
    pairs = unrelated(5, 5, 5, 5, m=211, n=199)
    merged = merge_factors(pairs, None, "bures")
    assert merged.report["converged"] and merged.report["overlap"] < 0.1
    assert any("nearly orthogonal" in warning and '"sum"' in warning for warning in merged.report["warnings"])
    wide = merge_factors(pairs, None, "bures", "sum")
    assert wide.report["converged"] and wide.report["warnings"] == []
    assert wide.report["objective"] < merged.report["objective"]
    assert merge_factors(related(SPREAD), None, "bures").report["warnings"] == []


def test_a_mean_that_did_not_converge_says_so(monkeypatch):
    pairs = unrelated(5, 5, 5, m=211, n=199)
    monkeypatch.setattr(bures_module, "MAX_ITERATIONS", 3)
    merged = merge_factors(pairs, None, "bures")
    assert not merged.report["converged"] and merged.report["iterations"] == 3
    assert merged.report["gradient_norm"] > 1e-3
    assert any(warning.startswith("not converged after 3") for warning in merged.report["warnings"])


def test_opposite_adapters_cancel():
    b, a = unrelated(RANK)[0]
    for method in METHODS:
        merged = merge_factors([(b, a), (-b, a)], None, method)
        assert float(product(merged).norm()) <= 1e-6 * float((b @ a).norm()) or merged.report["warnings"]
    for method in GEODESIC:
        report = merge_factors([(b, a), (-b, a)], None, method).report
        assert "weighted sum of the adapters has rank 0" in report["fallback"]["reason"]


# ---- geodesic means


def energy(path: Tensor, rows: int, metric: str) -> Tensor:
    """``K sum_k |c_{k+1} - c_k|^2`` of curves ``(..., K + 1, m + n, r)`` with the metric at the midpoints."""
    middle, step = 0.5 * (path[..., 1:, :, :] + path[..., :-1, :, :]), path.diff(dim=-3)
    (g, h), (x, y) = ((z[..., :rows, :], z[..., rows:, :]) for z in (middle, step))
    p, q = g.mT @ g, h.mT @ h
    left, right = (torch.linalg.inv(p), torch.linalg.inv(q)) if metric == "inv" else (q, p)
    squares = torch.einsum("...ia,...ab,...ib->...", x, left, x) + torch.einsum("...ia,...ab,...ib->...", y, right, y)
    return step.shape[-3] * squares.sum(-1)


def oracle(pairs: Pairs, weights: tuple[float, ...], metric: str, pieces: int) -> Tensor:
    """The mean as the minimum of the energies of polygons from the adapters to one point, in any gauge."""
    rows, rank = pairs[0][0].shape
    ends = torch.stack([torch.cat([b, a.mT]) for b, a in pairs])
    inner = ends.unsqueeze(1).repeat(1, pieces - 1, 1, 1).requires_grad_()
    mean = ends.mean(0).clone().requires_grad_()
    gauges = torch.eye(rank, dtype=torch.float64).repeat(len(pairs), 1, 1).requires_grad_()
    w = torch.tensor(weights, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([inner, mean, gauges], max_iter=600, history_size=60, tolerance_grad=1e-11,
                                  tolerance_change=0, line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        last = torch.cat([torch.linalg.solve(gauges, mean[:rows], left=False), mean[rows:] @ gauges.mT], dim=-2)
        value = (w * energy(torch.cat([ends.unsqueeze(1), inner, last.unsqueeze(1)], dim=1), rows, metric)).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return (mean[:rows] @ mean[rows:].mT).detach()


@pytest.mark.parametrize("method", GEODESIC)
def test_geodesic_means_against_discretised_paths(method):
    """The error of the oracle falls as ``1 / K^2``; its extrapolation agrees, and no other method does."""
    pairs = related(0.25, m=5, n=7, rank=2, seed=3)
    merged = merge_factors(pairs, WEIGHTS, method)
    assert merged.report["converged"] and merged.report["fallback"] is None
    coarse, fine = (oracle(pairs, WEIGHTS, method.removeprefix("geodesic-"), pieces) for pieces in (3, 6))
    errors = change(coarse, product(merged)), change(fine, product(merged))
    assert errors[1] <= 1e-4 and 3.5 <= errors[0] / errors[1] <= 4.5
    best = (4 * fine - coarse) / 3
    assert change(best, product(merged)) <= 2e-6
    for other in {*METHODS, "linear"} - {method}:
        assert change(best, delta(pairs, other)) > 1e-3


@pytest.mark.parametrize("method", GEODESIC)
def test_geodesic_means_are_stationary(method):
    """By finite distances of :class:`manifolds.FactorPair` between the full factors, not their cores."""
    from manifolds import FactorPair

    pairs = related(SPREAD)
    manifold = FactorPair(M, method.removeprefix("geodesic-"))
    points = torch.stack([torch.cat([b, a.mT]) for b, a in pairs])
    merged = merge_factors(pairs, WEIGHTS, method)
    x = torch.cat([merged.B, merged.A.mT])
    logs = manifold.logmap(x.expand_as(points), points)
    w = torch.tensor(WEIGHTS, dtype=torch.float64)
    gradient = torch.einsum("i,iab->ab", w, logs)
    lengths = manifold.norm(x.expand_as(points), logs)
    assert float(manifold.norm(x, gradient)) <= 1e-6 * float(lengths.max())
    assert merged.report["objective"] == pytest.approx(float(w @ lengths.square()), rel=1e-8)
    start = merge_factors(pairs, WEIGHTS, "tsvd")
    others = torch.stack([x + 0.02 * random(70 + i, M + N, RANK) for i in range(50)]
                         + [torch.cat([start.B, start.A.mT]), *points])  # fmt: skip
    distances = manifold.dist(*torch.broadcast_tensors(others.unsqueeze(0), points.unsqueeze(1)))
    assert float((w @ distances.square()).min()) >= merged.report["objective"]


@pytest.mark.parametrize("method", GEODESIC)
def test_opposite_signs_have_no_geodesic_mean(method):
    merged = merge_factors(toy((2.0, 3.0), (-0.5, 4.0)), None, method)
    assert float(product(merged)) == pytest.approx(2.0)
    fallback = merged.report["fallback"]
    assert fallback["method"] == "tsvd" and "no curve joins them" in fallback["reason"]
    assert any("merged by tsvd instead" in warning for warning in merged.report["warnings"])


@pytest.mark.parametrize(
    "pairs, rank, reason",
    [
        (unrelated(2, 3), "max", "which is 2 and 3"),
        (unrelated(3, 3), "sum", "rank 6 was asked for"),
        (unrelated(3, 3), 2, "rank 2 was asked for"),
        ([(random(0, M, 3), random(1, 3, N)), (random(2, M, 1).expand(M, 3), random(3, 3, N))], "max", "has rank 1"),
    ],
)
@pytest.mark.parametrize("method", GEODESIC)
def test_where_no_geodesic_mean_exists_another_method_is_named(method, pairs, rank, reason):
    merged = merge_factors(pairs, None, method, rank)
    assert merged.report["method"] == method and merged.report["fallback"]["method"] == "tsvd"
    assert reason in merged.report["fallback"]["reason"]
    assert change(product(merged), delta(pairs, "tsvd", None, rank=rank)) <= 1e-12
