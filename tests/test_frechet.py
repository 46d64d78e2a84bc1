"""Fréchet means, and the logarithm of factor pairs that they rest on."""

import math

import pytest
import torch
from cases import MANIFOLD_NAMES, manifold_case
from laws import close

from manifolds import BuresWasserstein, Elementwise, FactorPair, Product, ScaleQuotient, frechet_mean
from manifolds.logarithm import log_factor_pair

METRICS = ("inv", "mix")


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- closed forms


def test_elementwise_mean_is_geometric():
    points, w = vector(2.0, 8.0, 1.0, -3.0, -5.0, -1.0).reshape(2, 3).mT, (1.0, 2.0, 5.0)
    mean = frechet_mean(Elementwise(), points, w)
    expected = points[0].sign() * torch.exp((vector(*w)[:, None] * points.abs().log()).sum(0) / 8)
    assert mean.converged and mean.gradient_norm <= 1e-10 * mean.spread
    close(mean.point, expected, 1e-14)


def test_scale_mean_is_angular():
    angles, w = vector(0.3, 1.1, -0.4), (0.2, 0.5, 0.3)
    points = [r * vector(math.cos(a), math.sin(a)) for r, a in zip((1.0, 3.0, 7.0), angles.tolist())]
    mean = frechet_mean(ScaleQuotient(), points, w)
    assert mean.converged
    assert math.atan2(*mean.point.flip(0).tolist()) == pytest.approx(float(angles @ vector(*w)), abs=1e-12)


def test_bures_mean_of_commuting_matrices():
    a, b, w = vector(4.0, 1.0, 9.0), vector(1.0, 16.0, 25.0), (0.25, 0.75)
    turn = torch.linalg.qr(random(0, 3, 3)).Q
    mean = frechet_mean(BuresWasserstein(), [torch.diag(a.sqrt()), torch.diag(b.sqrt()) @ turn], w)
    assert mean.converged
    close(mean.point @ mean.point.mT, torch.diag((w[0] * a.sqrt() + w[1] * b.sqrt()) ** 2), 1e-12)


@pytest.mark.parametrize("metric, expected", [("inv", math.sqrt(12)), ("mix", 4.0)])
def test_factor_pair_toy(metric, expected):
    m, x, y = FactorPair(1, metric), vector(2.0, 3.0).reshape(2, 1), vector(-4.0, -0.5).reshape(2, 1)
    distance = math.log(3) if metric == "inv" else 4.0
    assert float(m.dist(x, y)) == pytest.approx(distance / math.sqrt(2), rel=1e-9)
    mean = frechet_mean(m, [x, y])
    assert mean.converged
    assert float(mean.point.prod()) == pytest.approx(expected, rel=1e-9)


# ---- laws


@pytest.mark.parametrize("name", MANIFOLD_NAMES)
def test_mean_laws(name):
    """Stationary, the same in any order and any gauge, equal weights by default, batched like a loop."""
    case = manifold_case(name, 3)
    m, points, w = case.manifold, case.points(3), [0.5, 1.5, 1.0]
    mean = frechet_mean(m, points, w)
    assert mean.converged and 0 < mean.iterations < 60
    gradient = sum(wi / 3 * m.logmap(mean.point, p) for wi, p in zip(w, points))
    assert float(m.norm(mean.point, gradient)) < 1e-8
    ordered = frechet_mean(m, [points[2], points[0], points[1]], [1.0, 0.5, 1.5])
    close(case.invariant(ordered.point), case.invariant(mean.point), 1e-8)
    moved = frechet_mean(m, case.act(points), w)
    close(case.invariant(moved.point), case.invariant(case.act(mean.point)), 1e-8)


@pytest.mark.parametrize("name", ["bures", "factor-inv", "factor-mix", "fixed-rank"])
def test_every_point_may_have_its_own_gauge(name):
    case = manifold_case(name, 3)
    m, points = case.manifold, case.points(3)
    mean, other = (frechet_mean(m, [points[0], p, points[2]]) for p in (points[1], case.act(points[1])))
    close(case.invariant(other.point), case.invariant(mean.point), 1e-8)
    changed = frechet_mean(m, [points[0], 0.9 * points[1], points[2]])
    assert float((case.invariant(changed.point) - case.invariant(mean.point)).norm()) > 1e-3


@pytest.mark.parametrize("name", MANIFOLD_NAMES)
def test_mean_of_one_orbit_and_unit_weights(name):
    case = manifold_case(name, 4)
    m, points = case.manifold, case.points(2)
    same = frechet_mean(m, [points[0]] * 3)
    assert same.converged
    close(same.point, points[0], 1e-12)
    first = frechet_mean(m, points, [1.0, 0.0])
    assert first.converged and first.iterations == 0
    close(first.point, points[0], 0.0)


@pytest.mark.parametrize("name", MANIFOLD_NAMES)
def test_batched_means(name):
    case = manifold_case(name, 5)
    points = torch.stack([case.points(2), case.points(2), case.points(2)])  # three points of two problems
    mean = frechet_mean(case.manifold, points)
    loop = [frechet_mean(case.manifold, points[:, i]) for i in range(2)]
    assert mean.converged and mean.iterations == max(one.iterations for one in loop)
    close(mean.point, torch.stack([one.point for one in loop]), 1e-9)


# ---- each problem of a batch


@pytest.mark.parametrize("name", ["bures", "factor-inv", "factor-mix", "fixed-rank"])
def test_every_problem_is_reported(name):
    case = manifold_case(name, 5)
    m, w = case.manifold, [0.5, 0.2, 0.3]
    points = torch.stack([torch.stack([case.points(2), case.points(2)]) for _ in range(3)])  # (3, 2, 2, ...)
    mean = frechet_mean(m, points, w)
    each = mean.per_problem
    assert each.converged.shape == (2, 2) and bool(each.converged.all()) is mean.converged is True
    assert mean.iterations >= int(each.iterations.max()) and int(each.iterations.min()) > 0
    assert mean.gradient_norm in each.gradient_norm and mean.spread in each.spread
    for i in range(2):
        for j in range(2):
            lengths = torch.stack([m.dist(mean.point[i, j], p) for p in points[:, i, j]])
            close(each.objective[i, j], (vector(*w) * lengths.square()).sum(), 1e-9)
            close(each.spread[i, j], lengths.max(), 1e-9)
            alone = frechet_mean(m, points[:, i, j], w)
            assert alone.per_problem.converged.shape == ()
            assert int(alone.per_problem.iterations) == int(each.iterations[i, j])
            close(alone.point, mean.point[i, j], 1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_a_problem_without_logarithm_does_not_stop_the_others(metric):
    m, (x, y) = FactorPair(1, metric), (vector(2.0, 3.0), vector(4.0, 0.5))
    points = torch.stack([torch.stack([x, x, y]), torch.stack([y, y * vector(-1.0, 1.0), x])])[..., None]
    mean = frechet_mean(m, points)
    each = mean.per_problem
    assert each.converged.tolist() == [True, False, True] and mean.converged is False
    assert [math.isinf(v) for v in each.gradient_norm.tolist()] == [False, True, False]
    assert math.isinf(mean.gradient_norm) and each.objective[1] == each.spread[1] == math.inf
    assert each.iterations[1] == 0
    close(mean.point[1], points[0, 1], 0.0)
    expected = math.sqrt(12) if metric == "inv" else 4.0
    close(mean.point.prod(-2).squeeze(-1)[[0, 2]], vector(expected, expected), 1e-8)
    with pytest.raises(ValueError, match="1 of 2"):
        frechet_mean(m, points[:, 1])


def test_errors_of_one_problem_are_kept_from_the_others():
    """Also where the manifold can only raise: the batch is halved until the problem at fault is alone."""
    points = torch.stack([vector(2.0, 1.0, 3.0, 5.0, 7.0), vector(8.0, 4.0, -3.0, 5.0, 7.0)])[..., None]
    each = frechet_mean(Elementwise(), points).per_problem
    assert each.converged.tolist() == [True, True, False, True, True]
    close(frechet_mean(Elementwise(), points).point[:2, 0], vector(4.0, 2.0), 1e-12)
    with pytest.raises(ValueError, match="signs differ in 3 of"):
        frechet_mean(Elementwise(), torch.stack([points[0, :3], -points[0, :3]]))  # none of them: a wrong argument


def test_problems_that_are_done_cost_nothing():
    """The logarithm is asked for the problems that still move only."""
    asked = []

    class Counting(BuresWasserstein):
        def logmap(self, x, y):
            asked.append(x.shape[1])
            return super().logmap(x, y)

    easy, hard = random(0, 7, 3), torch.stack([random(i, 7, 3) for i in range(1, 4)])
    points = torch.stack([easy.expand(3, 7, 3), hard, easy.expand(3, 7, 3)], dim=1)
    mean = frechet_mean(Counting(), points)
    assert mean.converged and mean.per_problem.iterations.tolist() == [0, mean.iterations, 0]
    assert asked == [3] + [1] * mean.iterations


def test_empty_batch():
    mean = frechet_mean(Elementwise(), torch.ones(3, 0, 5))
    assert mean.converged and mean.point.shape == (0, 5) and mean.per_problem.converged.shape == (0,)


def test_product_of_dictionaries():
    m = Product({"a": Elementwise(), "b": ScaleQuotient()})
    points = [{"a": random(i, 5).abs(), "b": random(i, 2, 3).abs()} for i in range(3)]
    mean = frechet_mean(m, points, [1.0, 2.0, 3.0])
    assert mean.converged and mean.per_problem["b"].converged.tolist() == [True, True]
    for name, factor in m.factors.items():
        close(mean.point[name], frechet_mean(factor, [p[name] for p in points], [1.0, 2.0, 3.0]).point, 1e-14)
    with pytest.raises(ValueError, match="lacks b"):
        frechet_mean(m, [points[0], {"a": points[1]["a"]}])
    with pytest.raises(ValueError, match="needs a Product"):
        frechet_mean(Elementwise(), points)


def test_single_precision_converges_and_stays():
    points = random(0, 3, 5).abs().float().requires_grad_()
    mean = frechet_mean(Elementwise(), points)
    assert mean.converged and mean.point.dtype == torch.float32 and not mean.point.requires_grad


def test_failure_is_reported():
    points = [random(i, 7, 3) for i in range(3)]
    mean = frechet_mean(BuresWasserstein(), points, max_iter=1)
    assert not mean.converged and mean.iterations == 1
    assert mean.gradient_norm > 1e-10 * mean.spread > 0
    better = frechet_mean(BuresWasserstein(), points, start=mean.point)
    assert better.converged and better.iterations < frechet_mean(BuresWasserstein(), points).iterations


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1.0], "2 points, 1 weights"),
        ([1.0, -0.1], ">= 0"),
        ([1.0, float("nan")], "finite"),
        ([float("inf"), 1.0], "finite"),
        ([0.0, 0.0], "not all zero"),
    ],
)
def test_wrong_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        frechet_mean(Elementwise(), [vector(1.0), vector(2.0)], weights)


def test_wrong_points():
    with pytest.raises(ValueError, match="must not be empty"):
        frechet_mean(Elementwise(), [])
    with pytest.raises(ValueError, match="one shape"):
        frechet_mean(Elementwise(), [vector(1.0), vector(1.0, 2.0)])
    with pytest.raises(ValueError, match="signs differ"):
        frechet_mean(Elementwise(), [vector(1.0), vector(-1.0)])


# ---- the logarithm of factor pairs


def pairs(metric: str, size: float, seed: int = 0):
    """A manifold, points, horizontal vectors of that length, and their endpoints in another gauge."""
    m, x = FactorPair(7, metric), random(seed, 4, 12, 3)
    u = m.proju(x, random(seed + 1, 4, 12, 3))
    u = size * u / m.norm(x, u, keepdim=True)
    gauge = torch.eye(3, dtype=torch.float64) + 0.4 * random(seed + 2, 4, 3, 3)
    return m, x, u, m.act(m.expmap(x, u), gauge)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", [1e-6, 0.3, 1.0])
def test_logarithm_inverts_the_exponential(metric, size):
    m, x, u, y = pairs(metric, size)
    result = log_factor_pair(m, x, y)
    assert bool(result.converged.all()) and float(result.miss.max()) < 1e-9 * size + 1e-11
    close(result.vector / size, u / size, 1e-8)
    close(m.dist(x, y), m.norm(x, u), 1e-9)
    close(m.dist(y, x), m.norm(x, u), 1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_distance_is_one_of_orbits(metric):
    m, x, _, y = pairs(metric, 0.5)
    gauge = torch.eye(3, dtype=torch.float64) + 0.5 * random(9, 3, 3)
    assert float((m.act(x, gauge) - x).norm()) > 0.1
    close(m.dist(m.act(x, gauge), y), m.dist(x, y), 1e-9)
    close(m.dist(x, m.act(x, gauge)), torch.zeros(4, dtype=torch.float64), 1e-10)
    other = 0.9 * x  # the negative control: not a change of gauge
    assert float((m.dist(other, y) - m.dist(x, y)).abs().min()) > 1e-3


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "eps, dtype", [(0.0, torch.complex128), pytest.param(0.1, torch.float64, marks=pytest.mark.slow)]
)
def test_logarithm_of_complex_and_relaxed_pairs(metric, eps, dtype):
    g = torch.Generator().manual_seed(0)
    m, x, u = FactorPair(5, metric, eps), *(torch.randn(9, 2, dtype=dtype, generator=g) for _ in range(2))
    u = m.proju(x, u)
    u = 0.1 * u / m.norm(x, u, keepdim=True)
    gauge = torch.eye(2) + 0.3 * torch.randn(2, 2, dtype=dtype, generator=g)
    log = m.logmap(x, m.act(m.expmap(x, u), gauge))
    close(torch.view_as_real(log + 0j), torch.view_as_real(u + 0j), 1e-8)


@pytest.mark.parametrize("metric", METRICS)
def test_no_geodesic_between_opposite_signs(metric):
    m = FactorPair(1, metric)
    x, y = vector(2.0, 3.0).reshape(2, 1), vector(-4.0, 0.5).reshape(2, 1)
    result = log_factor_pair(m, torch.stack([x, x]), torch.stack([y, 2 * x]))
    assert result.converged.tolist() == [False, True]
    assert float(result.miss[0]) > 0.1 and bool(torch.isfinite(result.vector).all())
    with pytest.raises(ValueError, match="1 of 1"):
        m.dist(x, y)


def test_mean_of_opposite_signs_is_refused():
    x, y = vector(2.0, 3.0).reshape(2, 1), vector(-4.0, 0.5).reshape(2, 1)
    with pytest.raises(ValueError, match="1 of 2"):
        frechet_mean(FactorPair(1, "inv"), [x, y])


@pytest.mark.parametrize("metric", METRICS)
def test_pairs_without_full_rank_do_not_converge(metric):
    m, x, y = FactorPair(7, metric), random(0, 12, 3), random(1, 12, 3)
    y[:7] = 0
    for a, b in ((x, y), (y, x)):
        result = log_factor_pair(m, a, b)
        assert not bool(result.converged) and bool(torch.isfinite(result.vector).all())
