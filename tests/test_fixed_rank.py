"""Matrices of fixed rank: both representations against dense algebra, closed forms and each other."""

from __future__ import annotations

import math

import geoopt
import pytest
import torch
from cases import manifold_case
from laws import LAWS, close
from test_low_rank import Largest
from torch import Tensor

from manifolds import FactorPair, FixedRank, frechet_mean
from manifolds.linalg import split
from manifolds.low_rank import svd_of_product, truncate, weighted_sum

M, N, R = 7, 5, 3
STACKED, DENSE = FixedRank(R, rows=M), FixedRank(R)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def product(pair: Tensor) -> Tensor:
    g, h = split(pair, M)
    return g @ h.mT


def push(pair: Tensor, u: Tensor) -> Tensor:
    """The velocity of the matrix of a stacked pair."""
    return torch.func.jvp(product, (pair,), (u,))[1]


def points(seed: int, size: float, *batch: int) -> tuple[Tensor, Tensor]:
    """Stacked pairs with horizontal vectors of that length relative to their smallest singular values."""
    x = normal(seed, *batch, M + N, R)
    u = STACKED.proju(x, normal(seed + 50, *batch, M + N, R))
    reach = torch.linalg.svdvals(product(x))[..., R - 1, None, None]
    return x, size * reach * u / STACKED.norm(x, u, keepdim=True)


def tangent_projection(x: Tensor, y: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    u, vh = u[..., :R], vh[..., :R, :]
    left, right = u @ u.mT, vh.mT @ vh
    return left @ y + y @ right - left @ y @ right


def truncated(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u[..., :R] * s[..., None, :R]) @ vh[..., :R, :]


def gauges(seed: int, *batch: int) -> Tensor:
    return torch.eye(R, dtype=torch.float64) + 0.3 * normal(seed, *batch, R, R)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws(law):
    law(manifold_case("fixed-rank", 1))


# ---- the tangent space


def test_projection_of_matrices():
    x, u, v = product(points(0, 1.0, 2)[0]), normal(1, 2, M, N), normal(2, 2, M, N)
    xi = DENSE.proju(x, u)
    close(xi, tangent_projection(x, u), 1e-12)
    close(DENSE.proju(x, xi), xi, 1e-12)
    close(DENSE.inner(x, xi, v), DENSE.inner(x, u, DENSE.proju(x, v)), 1e-12)
    close(DENSE.egrad2rgrad(x, u), xi, 1e-12)
    assert float((xi - u).norm()) > 1e-3


def test_projection_of_pairs():
    x, u, v = points(0, 1.0, 2)[0], normal(1, 2, M + N, R), normal(2, 2, M + N, R)
    xi = STACKED.proju(x, u)
    close(push(x, xi), push(x, u), 1e-12)
    close(STACKED.proju(x, xi), xi, 1e-12)
    close(STACKED.inner(x, xi, v), STACKED.inner(x, u, STACKED.proju(x, v)), 1e-12)
    close(STACKED.inner(x, xi, v), (push(x, xi) * push(x, v)).sum((-2, -1)), 1e-12)
    assert float((STACKED.inner(x, u) - push(x, u).square().sum((-2, -1))).abs().min()) > 1e-3  # u is not horizontal
    close(xi, FactorPair(M, "mix").proju(x, u), 1e-12)


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_factor_gradients_determine_the_gradient(condition):
    """``P_T`` of a dense gradient, from ``(G_dense H, G_dense^T G)``, also where the pair is badly conditioned."""
    x, dense = points(0, 1.0)[0], normal(1, M, N)
    x[:M, 2] /= condition
    g, h = split(x, M)
    gradient = STACKED.egrad2rgrad(x, torch.cat([dense @ h, dense.mT @ g]))
    close(push(x, gradient), tangent_projection(product(x), dense), 1e-12 * condition)
    close(STACKED.proju(x, gradient), gradient, 1e-12)


# ---- geodesics


def test_christoffel_is_minus_the_second_fundamental_form():
    """Against the second derivative of ``(x + t u) V (U^T (x + t u) V)^-1 U^T (x + t u)``, a curve on the manifold."""
    x, u = points(0, 1.0)
    matrix, xi = product(x), push(x, u)
    left, _, right = torch.linalg.svd(matrix)
    left, right = left[:, :R], right[:R].mT

    def curve(t: Tensor) -> Tensor:
        moved = matrix + t * xi
        return moved @ right @ torch.linalg.solve(left.mT @ moved @ right, left.mT @ moved)

    zero, one = torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype)
    velocity, bend = torch.func.jvp(lambda t: torch.func.jvp(curve, (t,), (one,))[1], (zero,), (one,))
    close(velocity, xi, 1e-12)
    close(DENSE.christoffel(matrix, xi), tangent_projection(matrix, bend) - bend, 1e-10)
    assert float(DENSE.christoffel(matrix, xi).norm()) > 1e-3
    second = torch.func.jvp(lambda p: push(p, u), (x,), (u,))[1] + push(x, -STACKED.christoffel(x, u))
    close(-DENSE.christoffel(matrix, xi), second, 1e-10)


@pytest.mark.parametrize("size", [0.3, 0.7])
def test_geodesics_have_normal_acceleration_constant_speed_and_rank(size):
    x, u = points(0, size, 2)
    curve, h = DENSE.geodesic(product(x), push(x, u)), 4e-3
    for t in (0.0, 0.5, 1.0):
        here, (a, b), (c, d) = curve(t), (curve(t + h), curve(t - h)), (curve(t + 2 * h), curve(t - 2 * h))
        velocity = (8 * (a - b) - (c - d)) / (12 * h)
        acceleration = (16 * (a + b) - (c + d) - 30 * here) / (12 * h * h)
        assert float(torch.linalg.svdvals(here)[..., R:].max()) < 1e-13
        close(torch.linalg.matrix_norm(velocity), torch.linalg.matrix_norm(push(x, u)), 1e-9)
        assert float(tangent_projection(here, acceleration).norm() / acceleration.norm()) < 1e-6


def test_rank_one_is_a_cone_over_two_spheres():
    """``dist(s u v^T, s' u' v'^T)^2 = s^2 + s'^2 - 2 s s' cos psi`` with ``psi^2`` the sum of both squared angles."""
    alpha, beta, s, t = 0.7, 1.1, 2.0, 3.0
    e = torch.eye(3, dtype=torch.float64)
    u, v = (math.cos(angle) * e[:1] + math.sin(angle) * e[1:2] for angle in (alpha, beta))
    x, y = s * e[:1].mT @ e[:1], t * u.mT @ v
    expected = math.sqrt(s * s + t * t - 2 * s * t * math.cos(math.hypot(alpha, beta)))
    assert float(FixedRank(1).dist(x, y)) == pytest.approx(expected, rel=1e-9)
    pair, other = torch.cat([s * e[:1], e[:1]], -1).mT, torch.cat([-t * u, -v], -1).mT
    assert float(FixedRank(1, rows=3).dist(pair, other)) == pytest.approx(expected, rel=1e-9)


def test_straight_where_the_column_spaces_stay():
    x, core = points(0, 1.0)[0], normal(5, R, R)
    g, h = split(x, M)
    xi = 0.1 * g @ core @ h.mT
    close(DENSE.expmap(product(x), xi), product(x) + xi, 1e-11)
    close(DENSE.logmap(product(x), product(x) + xi), xi, 1e-9)


def test_geodesic_that_loses_rank_is_refused():
    x = product(points(0, 1.0, 2)[0])
    u = torch.stack([-2 * x[0], 0.1 * x[1]])
    curve = DENSE.geodesic(x, u)
    close(curve(0.4)[0], 0.2 * x[0], 1e-9)
    with pytest.raises(ValueError, match="1 of 2 points loses rank before t = 1"):
        curve(1.0)


@pytest.mark.parametrize("size", [1e-4, 0.1, 1.0])
def test_logarithm_inverts_the_exponential(size):
    x, u = points(0, size, 4)
    y = STACKED.expmap(x, u)
    reach = float(STACKED.norm(x, u).max())
    close(STACKED.logmap(x, FactorPair(M).act(y, gauges(3, 4))) / reach, u / reach, 1e-9)
    close(DENSE.logmap(product(x), product(y)) / reach, push(x, u) / reach, 1e-9)
    close(STACKED.dist(y, x) / reach, STACKED.norm(x, u) / reach, 1e-9)


def test_logarithm_reports_what_it_does_not_find():
    x, u = points(0, 0.2, 2)
    y = STACKED.expmap(x, u)
    y[1, :, 0] = y[1, :, 1]  # a smaller rank
    for vector, found in (STACKED.try_logmap(x, y), DENSE.try_logmap(product(x), product(y))):
        assert found.tolist() == [True, False] and bool(torch.isfinite(vector).all())
    close(STACKED.try_logmap(x, y)[0][0], u[0], 1e-9)
    assert STACKED.try_logmap(y, x)[1].tolist() == [True, False]
    with pytest.raises(ValueError, match="1 of 2 pairs"):
        STACKED.dist(x, y)


def test_no_geodesic_between_opposite_signs():
    x = torch.tensor([[[2.0]], [[2.0]]], dtype=torch.float64)
    vector, found = FixedRank(1).try_logmap(x, x * torch.tensor([-1.0, 3.0], dtype=x.dtype)[:, None, None])
    assert found.tolist() == [False, True]
    assert float(vector[1]) == pytest.approx(4.0, rel=1e-12)


# ---- the two representations


def test_representations_agree():
    x, u = points(0, 0.5, 2, 3)
    v, ambient = STACKED.proju(x, normal(9, 2, 3, M + N, R)), normal(10, 2, 3, M + N, R)
    y, matrix, xi, eta = STACKED.expmap(x, u), product(x), push(x, u), push(x, v)
    close(STACKED.inner(x, u, v), DENSE.inner(matrix, xi, eta), 1e-12)
    close(push(x, STACKED.proju(x, ambient)), DENSE.proju(matrix, push(x, ambient)), 1e-12)
    for method in ("exact", "taylor2", "linear"):
        close(product(STACKED.geodesic(x, u, method)(0.7)), DENSE.geodesic(matrix, xi, method)(0.7), 1e-9)
    close(product(STACKED.retr(x, u)), DENSE.retr(matrix, xi), 1e-12)
    close(push(x, STACKED.logmap(x, y)), DENSE.logmap(matrix, product(y)), 1e-9)
    close(STACKED.dist(x, y), DENSE.dist(matrix, product(y)), 1e-9)
    close(push(y, STACKED.transp(x, y, v)), DENSE.transp(matrix, product(y), eta), 1e-11)
    close(DENSE.transp(matrix, product(y), eta), tangent_projection(product(y), eta), 1e-11)
    close(product(STACKED.projx(x)), DENSE.projx(matrix), 1e-12)
    close(DENSE.vertical(matrix, normal(1, R, R)), torch.zeros_like(matrix), 0.0)


def test_gauges_of_points_do_not_matter():
    x, u = points(0, 0.5, 2)
    v, act = STACKED.proju(x, normal(9, 2, M + N, R)), FactorPair(M).act
    y = STACKED.expmap(x, u)
    a, b = gauges(1, 2), gauges(2, 2)
    gx, gu, gv, gy = act(x, a), act(u, a), act(v, a), act(y, b)
    assert float((gx - x).norm()) > 0.1
    close(STACKED.inner(gx, gu, gv), STACKED.inner(x, u, v), 1e-12)
    close(STACKED.retr(gx, gu), act(STACKED.retr(x, u), a), 1e-10)
    close(STACKED.transp(gx, gy, gv), act(STACKED.transp(x, y, v), b), 1e-10)
    close(STACKED.logmap(gx, gy), act(STACKED.logmap(x, y), a), 1e-9)
    close(STACKED.projx(gx).abs(), STACKED.projx(x).abs(), 1e-11)  # up to the signs of singular vectors
    skewed = gx.clone()
    skewed[..., :M, :] *= 1.1  # the negative control: not a change of gauge
    assert float((STACKED.dist(skewed, y) - STACKED.dist(x, y)).abs().min()) > 1e-3


# ---- the retraction


@pytest.mark.parametrize("manifold", [STACKED, DENSE], ids=["stacked", "dense"])
def test_retraction_truncates_and_has_second_order(manifold):
    x, u = points(0, 1.0)
    matrix, xi = product(x), push(x, u)
    start, direction, place = (x, u, product) if manifold is STACKED else (matrix, xi, lambda y: y)
    close(place(manifold.retr(start, direction)), truncated(matrix + xi), 1e-12)
    close(manifold.retr(start, 0 * direction), start, 1e-12)
    h = 1e-4
    steps = (manifold.retr(start, t * direction) for t in (h, -h))
    close((next(steps) - next(steps)) / (2 * h), direction, 1e-6)
    errors = [
        float((place(manifold.retr(start, t * direction)) - DENSE.expmap(matrix, t * xi)).norm()) for t in (0.04, 0.02)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.2)


def test_retraction_far_away_still_truncates():
    x = points(0, 1.0)[0]
    for u in (-2.0 * x, -x, 50 * STACKED.proju(x, normal(3, M + N, R))):
        expected = truncated(product(x) + push(x, STACKED.proju(x, u)))
        close(product(STACKED.retr(x, u)), expected, 1e-10)


@pytest.mark.parametrize("make", [lambda p: geoopt.optim.RiemannianAdam([p], lr=0.05),
                                  lambda p: geoopt.optim.RiemannianSGD([p], lr=0.01, momentum=0.9)])  # fmt: skip
def test_training_does_not_depend_on_the_gauge(make):
    inputs, targets, x, ends = normal(0, 17, N), normal(1, 17, M), points(2, 1.0)[0], []
    for start in (x, FactorPair(M).act(x, gauges(4))):
        p = geoopt.ManifoldParameter(start.clone(), manifold=STACKED)
        optimizer, losses = make(p), []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (inputs @ product(p).mT - targets).square().mean()
            loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
        assert losses[-1] < 0.9 * losses[0]
        ends.append(product(p).detach())
    close(ends[1], ends[0], 1e-9)
    assert float((ends[0] - product(x)).norm()) > 1e-2


# ---- means


def test_mean_is_the_truncated_mean_to_third_order():
    x, u = points(0, 1.0, 4)
    x, u = x[:1].expand(4, -1, -1), STACKED.proju(x[:1].expand(4, -1, -1), u)
    errors = []
    for size in (0.1, 0.05):
        cloud = STACKED.expmap(x, size * u)
        cloud = FactorPair(M).act(cloud, gauges(6, 4))
        mean = frechet_mean(STACKED, cloud)
        assert mean.converged
        factors = [(g, h.mT) for g, h in (split(p, M) for p in cloud)]
        cut = truncate(svd_of_product(*weighted_sum(factors, [0.25] * 4)), R)
        errors.append(float((product(mean.point) - (cut.u * cut.s) @ cut.v.mT).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.3)
    dense = frechet_mean(DENSE, product(cloud))
    close(product(mean.point), dense.point, 1e-9)


# ---- arguments, checks, derivatives, size


def test_derivatives_of_matrices_also_where_singular_values_coincide():
    q, p = torch.linalg.qr(normal(0, M, R)).Q, torch.linalg.qr(normal(1, N, R)).Q
    x, u = (2 * q @ p.mT).requires_grad_(), (0.3 * normal(2, M, N)).requires_grad_()
    for method in (DENSE.proju, DENSE.expmap):
        assert torch.autograd.gradcheck(method, (x, u), fast_mode=True)
    pair = torch.cat([2 * q, p]).requires_grad_()
    assert torch.autograd.gradcheck(STACKED.proju, (pair, (0.3 * normal(3, M + N, R)).requires_grad_()))


def test_points_are_checked():
    x = points(0, 1.0)[0]
    for manifold, good in ((STACKED, x), (DENSE, product(x))):
        manifold.assert_check_point_on_manifold(good)
        manifold.assert_check_vector_on_tangent(good, manifold.proju(good, normal(1, *good.shape)))
    assert "above 3" in DENSE.check_point_on_manifold(normal(0, M, N), explain=True)[1]
    assert "horizontal" in STACKED.check_vector_on_tangent(x, normal(1, M + N, R), explain=True)[1]
    low = x.clone()
    low[:, 0] = low[:, 1]
    for manifold, bad in ((STACKED, low), (DENSE, product(low))):
        assert "below 3" in manifold.check_point_on_manifold(bad, explain=True)[1]
        with pytest.raises(ValueError, match="1 of 1 points have a rank below 3"):
            manifold.proju(bad, bad)
    close(DENSE.projx(normal(0, M, N)), truncated(normal(0, M, N)), 1e-13)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        FixedRank(0)
    with pytest.raises(ValueError, match="rows must be at least the rank 3; got 2"):
        FixedRank(3, rows=2)
    with pytest.raises(ValueError, match=r"shape \(..., 7 \+ n, 3\) with n >= 3; got \(9, 3\)"):
        STACKED.proju(normal(0, 9, 3), normal(0, 9, 3))
    with pytest.raises(ValueError, match=r"m, n >= 3; got \(7, 2\)"):
        DENSE.proju(normal(0, 7, 2), normal(0, 7, 2))
    with pytest.raises(ValueError, match="must be real; got torch.complex128"):
        DENSE.proju(normal(0, 7, 5) + 0j, normal(0, 7, 5))


def test_large_pairs_stay_thin():
    size, rank = 4099, 5
    manifold, x = FixedRank(rank, rows=size), normal(0, 2 * size, rank)
    u = manifold.proju(x, normal(1, 2 * size, rank))
    u = 0.1 * manifold.norm(x, x) * u / manifold.norm(x, u)
    with Largest() as largest:
        y = manifold.expmap(x, u)
        close(manifold.logmap(x, y), u, 1e-9)
        manifold.transp(x, manifold.retr(x, u), u)
        manifold.egrad2rgrad(x, u)
    assert largest.entries <= 2 * size * 2 * rank
