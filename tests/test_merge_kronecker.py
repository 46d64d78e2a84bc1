"""Means under Kronecker metrics: dense weights, low-rank updates, RegMean, KFAC."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from symgeo.merge.kronecker import kronecker_mean
from symgeo.merge.metric_factors import kronecker_factors, regmean_factors
from symgeo.merge.metrics import KroneckerMetric

ROWS, COLUMNS, RANKS, WEIGHTS = 11, 13, (2, 3, 5), (0.5, 0.2, 0.3)


class Draws:
    """Seeded random matrices."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def spd(self, n: int, count: int | None = None) -> Tensor:
        x = self(2 * n if count is None else count, n)
        return x.T @ x / x.shape[0]

    def metrics(self) -> list[KroneckerMetric]:
        return [KroneckerMetric(self.spd(ROWS), self.spd(COLUMNS)) for _ in WEIGHTS]

    def points(self) -> list[Tensor]:
        return [self(ROWS, COLUMNS) for _ in WEIGHTS]

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        return [(self(ROWS, r), self(r, COLUMNS)) for r in RANKS]


def change(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape and bool(torch.isfinite(x).all() and torch.isfinite(y).all())
    return float((x - y).norm() / y.norm())


def matrix(metric: KroneckerMetric) -> Tensor:
    left = torch.eye(ROWS, dtype=torch.float64) if metric.left is None else metric.left
    return torch.kron(left, metric.right)


def dense_mean(points: list[Tensor], metrics: list[KroneckerMetric]) -> Tensor:
    system = sum(c * matrix(m) for c, m in zip(WEIGHTS, metrics))
    target = sum(c * matrix(m) @ w.flatten() for c, m, w in zip(WEIGHTS, metrics, points))
    return torch.linalg.solve(system, target).reshape(ROWS, COLUMNS)


# the mean under Kronecker metrics


def test_the_mean_solves_the_dense_system():
    draws = Draws()
    points, metrics = draws.points(), draws.metrics()
    found = kronecker_mean(points, metrics, WEIGHTS)
    assert bool(found.converged) and float(found.residual) <= 1e-10 and 1 < int(found.iterations) < 100
    assert change(found.point, dense_mean(points, metrics)) <= 1e-8
    assert change(found.point, sum(c * w for c, w in zip(WEIGHTS, points))) > 0.1


def test_merged_metrics_do_not_give_the_mean():
    """``(sum L_i) (x) (sum R_i)`` in place of ``sum L_i (x) R_i`` (arXiv 2602.17385, Eq. 8) is a different merge."""
    draws = Draws()
    points, metrics = draws.points(), draws.metrics()
    target = sum(c * m.lower(w) for c, m, w in zip(WEIGHTS, metrics, points))
    left, right = (sum(c * getattr(m, side) for c, m in zip(WEIGHTS, metrics)) for side in ("left", "right"))
    heuristic = torch.linalg.solve(right, torch.linalg.solve(left, target).T).T
    exact = dense_mean(points, metrics)
    scale = float((heuristic * exact).sum() / heuristic.square().sum())
    assert change(scale * heuristic, exact) > 0.05


def moved(metric: KroneckerMetric, m: Tensor, n: Tensor) -> KroneckerMetric:
    inverse = torch.linalg.inv(m)
    assert metric.left is not None
    return KroneckerMetric(inverse.T @ metric.left @ inverse, n @ metric.right @ n.T)


def test_the_mean_is_equivariant():
    draws = Draws(1)
    points, metrics, m, n = draws.points(), draws.metrics(), draws(ROWS, ROWS), draws(COLUMNS, COLUMNS)
    images = [m @ w @ torch.linalg.inv(n) for w in points]
    carried = [moved(metric, m, n) for metric in metrics]
    expected = m @ kronecker_mean(points, metrics, WEIGHTS).point @ torch.linalg.inv(n)
    assert change(kronecker_mean(images, carried, WEIGHTS).point, expected) <= 1e-8
    assert change(kronecker_mean(images, metrics, WEIGHTS).point, expected) > 1e-3
    unfinished = [kronecker_mean(w, g, WEIGHTS, max_iter=3) for w, g in ((points, metrics), (images, carried))]
    assert change(unfinished[1].point, m @ unfinished[0].point @ torch.linalg.inv(n)) <= 1e-8
    assert not bool(unfinished[0].converged) and float(unfinished[0].residual) > 1e-10


def test_without_left_factors_it_is_regmean_in_one_step():
    draws = Draws(2)
    points, grams = draws.points(), [draws.spd(COLUMNS) for _ in WEIGHTS]
    found = kronecker_mean(points, [KroneckerMetric(None, c) for c in grams], WEIGHTS)
    target = sum(w * x @ c for w, x, c in zip(WEIGHTS, points, grams))
    expected = torch.linalg.solve(sum(w * c for w, c in zip(WEIGHTS, grams)), target.T).T
    assert change(found.point, expected) <= 1e-10 and int(found.iterations) <= 2


def test_batches_stop_one_by_one():
    draws = Draws(3)
    points = [torch.stack([draws(ROWS, COLUMNS) for _ in range(2)]) for _ in WEIGHTS]
    lefts = [torch.stack([torch.eye(ROWS, dtype=torch.float64), draws.spd(ROWS)]) for _ in WEIGHTS]
    rights = [draws.spd(COLUMNS) for _ in WEIGHTS]
    found = kronecker_mean(points, [KroneckerMetric(x, y) for x, y in zip(lefts, rights)], WEIGHTS)
    assert found.iterations.tolist()[0] < found.iterations.tolist()[1] and bool(found.converged.all())
    for i in range(2):
        metrics = [KroneckerMetric(x[i], y) for x, y in zip(lefts, rights)]
        assert change(found.point[i], dense_mean([w[i] for w in points], metrics)) <= 1e-8


def test_directions_that_no_metric_sees_keep_the_average():
    draws = Draws(4)
    points, hidden = draws.points(), draws(COLUMNS)
    hidden = hidden / hidden.norm()
    blind = torch.eye(COLUMNS, dtype=torch.float64) - torch.outer(hidden, hidden)
    metrics = [KroneckerMetric(draws.spd(ROWS), blind @ draws.spd(COLUMNS) @ blind) for _ in WEIGHTS]
    found = kronecker_mean(points, metrics, WEIGHTS)
    assert bool(found.converged)
    assert change(found.point @ hidden, sum(c * w for c, w in zip(WEIGHTS, points)) @ hidden) <= 1e-10


def test_equal_points_are_their_mean_and_zero_is_zero():
    draws = Draws(5)
    metrics, point = draws.metrics(), draws(ROWS, COLUMNS).float()
    found = kronecker_mean([point] * 3, metrics)
    assert found.point.dtype == torch.float32 and change(found.point, point) <= 1e-6
    nothing = kronecker_mean([torch.zeros(ROWS, COLUMNS)] * 3, metrics)
    assert float(nothing.point.norm()) == 0.0 and bool(nothing.converged)


def test_wrong_metrics_are_named():
    draws = Draws()
    points, metrics = draws.points(), draws.metrics()
    with pytest.raises(ValueError, match="metrics: needed one per adapter or point, 3; got 2"):
        kronecker_mean(points, metrics[:2])
    with pytest.raises(ValueError, match=r"metrics\[1\]: factors of sizes \(13, 13\) do not fit"):
        kronecker_mean(points, [metrics[0], KroneckerMetric(draws.spd(13), draws.spd(13)), metrics[2]])
    with pytest.raises(ValueError, match="the sum of the right factors must be positive semidefinite"):
        kronecker_mean(points, [KroneckerMetric(None, -draws.spd(COLUMNS))] * 3)
    with pytest.raises(ValueError, match="left: needed a symmetric matrix"):
        KroneckerMetric(draws(3, 3), draws.spd(3))
    with pytest.raises(ValueError, match="right: needed a square matrix"):
        KroneckerMetric(None, draws(3, 2))
    with pytest.raises(ValueError, match="right: has entries that are not finite"):
        KroneckerMetric(None, math.nan * draws.spd(3))


# KFAC


def gauss_newton(outputs, weight: Tensor, inputs: Tensor) -> Tensor:
    """``mean J^T J`` over the samples, in row-major order, by automatic differentiation."""
    jacobian = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0))(weight, inputs)
    flat = jacobian.flatten(-2)
    return (flat.mT @ flat).mean(0)


def test_the_metric_of_a_linear_network_is_its_gauss_newton_matrix():
    draws = Draws(6)
    weight, inputs, behind = draws(3, 5), draws(17, 5), draws(2, 3)
    output = KroneckerMetric.from_samples(inputs)
    exact = gauss_newton(lambda w, a: w @ a, weight, inputs)
    assert change(torch.kron(torch.eye(3, dtype=torch.float64), output.right), exact) <= 1e-12
    hidden = KroneckerMetric.from_samples(inputs, behind.expand(17, 2, 3))
    exact = gauss_newton(lambda w, a: behind @ (w @ a), weight, inputs)
    assert change(torch.kron(hidden.left, hidden.right), exact) <= 1e-12


def test_the_metric_of_a_nonlinear_network_is_exact_for_one_sample_only():
    draws = Draws(7)
    weight, inputs, behind = draws(3, 5), draws(17, 5), draws(2, 3)

    def network(w: Tensor, a: Tensor) -> Tensor:
        return behind @ torch.tanh(w @ a)

    jacobians = torch.func.vmap(torch.func.jacrev(lambda z: behind @ torch.tanh(z)))(inputs @ weight.T)
    for samples, exact in ((1, True), (17, False)):
        metric = KroneckerMetric.from_samples(inputs[:samples], jacobians[:samples])
        error = change(torch.kron(metric.left, metric.right), gauss_newton(network, weight, inputs[:samples]))
        assert error <= 1e-12 if exact else error > 1e-3


def test_inner_product_is_that_of_the_dense_metric():
    draws = Draws(8)
    metric, x, y = draws.metrics()[0], draws(ROWS, COLUMNS), draws(ROWS, COLUMNS)
    expected = x.flatten() @ matrix(metric) @ y.flatten()
    assert abs(float(metric.inner(x, y) - expected)) <= 1e-12 * abs(float(expected))
    m, n = draws(ROWS, ROWS), draws(COLUMNS, COLUMNS)
    images = [m @ z @ torch.linalg.inv(n) for z in (x, y)]
    assert abs(float(moved(metric, m, n).inner(*images) / expected) - 1) <= 1e-8


# low-rank updates


def objective(x: Tensor, factors, metrics) -> float:
    parts = zip(WEIGHTS, metrics, factors)
    return float(sum(c * m.inner(x - b @ a, x - b @ a) for c, m, (b, a) in parts))


def test_regmean_of_factors_is_that_of_the_deltas():
    draws = Draws(9)
    factors, grams = draws.factors(), [draws.spd(COLUMNS) for _ in RANKS]
    merged = regmean_factors(factors, grams, WEIGHTS, rank="sum")
    expected = dense_mean([b @ a for b, a in factors], [KroneckerMetric(None, c) for c in grams])
    assert change(merged.B @ merged.A, expected) <= 1e-10
    assert merged.B.shape == (ROWS, sum(RANKS)) and merged.report["retained_energy"] == 1.0
    other = [(b @ torch.linalg.inv(g), g @ a) for (b, a), g in zip(factors, (draws(r, r) for r in RANKS))]
    again = regmean_factors(other, grams, WEIGHTS, rank="sum")
    assert change(again.B @ again.A, expected) <= 1e-9


def test_regmean_at_rank_r_is_the_minimiser_of_its_objective():
    draws = Draws(10)
    factors, grams = draws.factors(), [draws.spd(COLUMNS) for _ in RANKS]
    metrics = [KroneckerMetric(None, c) for c in grams]
    merged = regmean_factors(factors, grams, WEIGHTS, rank=2)
    best = objective(merged.B @ merged.A, factors, metrics)
    whole = dense_mean([b @ a for b, a in factors], metrics)
    u, s, vh = torch.linalg.svd(whole)
    assert objective((u[:, :2] * s[:2]) @ vh[:2], factors, metrics) > best * (1 + 1e-3)  # the plain truncation
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            b, a = merged.B + size * draws(ROWS, 2), merged.A + size * draws(2, COLUMNS)
            assert objective(b @ a, factors, metrics) > best
    b, a = merged.B.clone().requires_grad_(), merged.A.clone().requires_grad_()
    slope = torch.autograd.grad(
        sum(c * m.inner(b @ a - x @ y, b @ a - x @ y) for c, m, (x, y) in zip(WEIGHTS, metrics, factors)), (b, a)
    )
    assert max(float(g.norm()) for g in slope) <= 1e-10 * best


def test_grams_of_few_inputs():
    draws = Draws(11)
    factors, seen = draws.factors(), draws(7, COLUMNS)  # all inputs lie in a space of 7 dimensions
    grams = [seen.T @ draws.spd(7, 5) @ seen for _ in RANKS]
    merged = regmean_factors(factors, grams, WEIGHTS, rank="sum")
    metrics = [KroneckerMetric(None, c) for c in grams]
    best = objective(merged.B @ merged.A, factors, metrics)
    expected = kronecker_mean([b @ a for b, a in factors], metrics, WEIGHTS).point
    assert abs(best / objective(expected, factors, metrics) - 1) <= 1e-8
    assert float((merged.B @ merged.A).norm()) <= float(expected.norm())


def galerkin(factors, metrics) -> Tensor:
    """The minimiser among ``Q X P^T``, from the dense normal equations."""
    q = torch.linalg.qr(torch.cat([b for b, _ in factors], 1)).Q
    p = torch.linalg.qr(torch.cat([a for _, a in factors], 0).T).Q
    basis = torch.kron(q, p)
    system = basis.T @ sum(c * matrix(m) for c, m in zip(WEIGHTS, metrics)) @ basis
    target = basis.T @ sum(c * matrix(m) @ (b @ a).flatten() for c, m, (b, a) in zip(WEIGHTS, metrics, factors))
    return (basis @ torch.linalg.solve(system, target)).reshape(ROWS, COLUMNS)


def test_the_two_sided_mean_of_factors_is_the_minimiser_in_their_spans():
    draws = Draws(12)
    factors, metrics = draws.factors(), draws.metrics()
    merged = kronecker_factors(factors, metrics, WEIGHTS, rank="sum")
    expected = galerkin(factors, metrics)
    assert change(merged.B @ merged.A, expected) <= 1e-8 and merged.report["converged"]
    outside = dense_mean([b @ a for b, a in factors], metrics)
    assert objective(outside, factors, metrics) < objective(expected, factors, metrics) * (1 - 1e-3)
    cut = kronecker_factors(factors, metrics, WEIGHTS, rank=2)
    assert cut.B.shape == (ROWS, 2) and cut.report["retained_energy"] < 1


@pytest.mark.parametrize("rank", [2, "sum"])
def test_the_two_sided_mean_of_factors_is_equivariant_and_invariant(rank):
    draws = Draws(13)
    factors, metrics = draws.factors(), draws.metrics()
    m, n = draws(ROWS, ROWS), draws(COLUMNS, COLUMNS)
    first = kronecker_factors(factors, metrics, WEIGHTS, rank)
    images = [(m @ b, a @ torch.linalg.inv(n)) for b, a in factors]
    images = [(b @ torch.linalg.inv(g), g @ a) for (b, a), g in zip(images, (draws(r, r) for r in RANKS))]
    second = kronecker_factors(images, [moved(metric, m, n) for metric in metrics], WEIGHTS, rank)
    expected = m @ first.B @ first.A @ torch.linalg.inv(n)
    assert change(second.B @ second.A, expected) <= 1e-8
    unmoved = kronecker_factors(images, metrics, WEIGHTS, rank)
    assert change(unmoved.B @ unmoved.A, expected) > 1e-3


def test_wrong_factors_and_weights_are_refused():
    draws = Draws()
    factors, metrics = draws.factors(), draws.metrics()
    with pytest.raises(ValueError, match="weights: a Fréchet mean needs numbers >= 0"):
        kronecker_factors(factors, metrics, (1.0, -1.0, 1.0))
    with pytest.raises(ValueError, match="metrics: needed one per adapter"):
        regmean_factors(factors, [draws.spd(COLUMNS)])
    with pytest.raises(ValueError, match="do not fit weights of shape"):
        regmean_factors(factors, [draws.spd(ROWS)] * 3)
    with pytest.raises(ValueError, match="rank must be"):
        kronecker_factors(factors, metrics, rank="all")
