"""Factor pairs: closed forms and integrators against each other, and what the laws do not reach."""

from __future__ import annotations

import math

import pytest
import torch
from cases import manifold_case
from laws import LAWS
from torch import Tensor

from manifolds import FactorPair
from manifolds.geodesic import integrate
from manifolds.linalg import balance, divide, eigh, expm, gram, split, square_root, sylvester
from manifolds.relaxed import RelaxedMetric

N, M, H = 7, 5, 3
KINDS = [(dtype, metric) for dtype in (torch.float64, torch.complex128) for metric in ("inv", "mix")]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def definition(metric: str, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The metric straight from its definition, with explicit inverses."""
    m_g, m_h = (gram(side) for side in split(x, N))
    p_g, p_h = (torch.linalg.inv(m_g), torch.linalg.inv(m_h)) if metric == "inv" else (m_h, m_g)
    (u_g, u_h), (v_g, v_h) = split(u, N), split(v, N)
    terms = p_g @ u_g.mH @ v_g, p_h @ u_h.mH @ v_h
    return sum(term.diagonal(dim1=-2, dim2=-1).sum(-1).real for term in terms)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", ["factor-inv", "factor-mix"])
def test_laws(name: str, law) -> None:
    law(manifold_case(name, seed=1))


@pytest.mark.parametrize(("dtype", "metric"), KINDS)
def test_complex_and_real_pairs_obey_the_definition(dtype: torch.dtype, metric: str) -> None:
    manifold = FactorPair(N, metric)
    x, u, v = (normal(seed, 2, N + M, H, dtype=dtype) for seed in range(3))
    assert torch.allclose(manifold.inner(x, u, v), definition(metric, x, u, v), rtol=1e-12)
    level = normal(3, 2, H, H, dtype=dtype)
    horizontal = manifold.proju(x, u)
    assert manifold.inner(x, horizontal, manifold.vertical(x, level)).abs().max() < 1e-10
    assert manifold.inner(x, u, manifold.vertical(x, level)).abs().max() > 1e-3
    assert torch.allclose(manifold.proju(x, horizontal), horizontal, atol=1e-12)


@pytest.mark.parametrize(("dtype", "metric"), KINDS)
def test_christoffel_is_autograd_of_the_metric(dtype: torch.dtype, metric: str) -> None:
    manifold, x, u, v = FactorPair(N, metric), *(normal(seed, 2, N + M, H, dtype=dtype) for seed in range(3))

    def lower(point: Tensor) -> Tensor:
        return torch.func.grad(lambda w: definition(metric, point, u, w).sum())(v)

    change = torch.func.jvp(lower, (x,), (u,))[1]
    slope = torch.func.grad(lambda point: definition(metric, point, u, u).sum())(x)
    lowered = torch.func.grad(lambda w: definition(metric, x, manifold.christoffel(x, u), w).sum())(v)
    assert torch.allclose(lowered, change - 0.5 * slope, atol=1e-10 * float(change.abs().max()))


@pytest.mark.parametrize(("dtype", "metric"), KINDS)
def test_exact_geodesic_is_a_fine_runge_kutta(dtype: torch.dtype, metric: str) -> None:
    manifold, x = FactorPair(N, metric), normal(0, 2, N + M, H, dtype=dtype)
    u = manifold.proju(x, 0.3 * normal(1, 2, N + M, H, dtype=dtype))
    y, steps = torch.stack([x, u]), 400

    def field(state: Tensor) -> Tensor:
        (g, h), (u_g, u_h) = split(state[0], N), split(state[1], N)
        cross_g, cross_h = u_g.mH @ g, u_h.mH @ h
        if metric == "inv":
            m, n = torch.linalg.inv(gram(g)), torch.linalg.inv(gram(h))
            bend_g = g @ m @ gram(u_g) - u_g @ m @ (cross_g + cross_g.mH)
            bend_h = h @ n @ gram(u_h) - u_h @ n @ (cross_h + cross_h.mH)
        else:
            bend_g = (u_g @ (cross_h + cross_h.mH) - g @ gram(u_h)) @ torch.linalg.inv(gram(h))
            bend_h = (u_h @ (cross_g + cross_g.mH) - h @ gram(u_g)) @ torch.linalg.inv(gram(g))
        return torch.stack([state[1], -torch.cat([bend_g, bend_h], dim=-2)])

    for _ in range(steps):
        k1 = field(y)
        k2 = field(y + 0.5 / steps * k1)
        k3 = field(y + 0.5 / steps * k2)
        k4 = field(y + 1.0 / steps * k3)
        y = y + (k1 + 2 * k2 + 2 * k3 + k4) / (6 * steps)
    error = (manifold.geodesic(x, u)(1.0) - y[0]).abs().max()
    straight = (manifold.geodesic(x, u, "linear")(1.0) - y[0]).abs().max()
    assert error < 1e-9 < 1e-3 < straight


def test_inv_geodesic_holds_for_any_velocity_and_restarts() -> None:
    manifold, x, u = FactorPair(N), normal(0, N + M, H), 0.4 * normal(1, N + M, H)
    curve = manifold.geodesic(x, u)
    half, velocity = torch.func.jvp(curve, (torch.tensor(0.5, dtype=torch.float64),),
                                    (torch.tensor(1.0, dtype=torch.float64),))
    assert torch.allclose(manifold.geodesic(half, velocity)(0.5), curve(1.0), atol=1e-11)
    assert torch.isfinite(curve(30.0)).all()  # complete


def test_inv_geodesic_is_differentiable_at_zero() -> None:
    manifold, x, direction = FactorPair(N), normal(0, N + M, H), normal(1, N + M, H)
    end, slope = torch.func.jvp(lambda u: manifold.geodesic(x, u)(1.0), (torch.zeros_like(x),), (direction,))
    assert torch.allclose(end, x, atol=1e-13)
    assert torch.allclose(slope, direction, atol=1e-12)
    frame = manifold.frame(x)
    assert torch.autograd.gradcheck(lambda z: frame.curve(z, 1.0, "exact", bound=1.0),
                                    torch.zeros(N + M, H, dtype=torch.float64, requires_grad=True))


def test_projection_needs_the_corrected_sylvester_equation() -> None:
    """The published ``A L + L A^T = B`` leaves a vertical part; the transposed one does not."""
    x, u = normal(0, N + M, H), normal(1, N + M, H)
    (g, h), (u_g, u_h) = split(x, N), split(u, N)
    m_g, m_h = gram(g), gram(h)
    a, b = m_g @ m_h, m_g @ h.mT @ u_h - u_g.mT @ g @ m_h
    eye = torch.eye(H, dtype=torch.float64)
    solve = lambda matrix: torch.linalg.solve(matrix, b.reshape(-1)).reshape(H, H)  # noqa: E731
    published = solve(torch.kron(a, eye) + torch.kron(eye, a))
    corrected = solve(torch.kron(a, eye) + torch.kron(eye, a.mT.contiguous())).mT  # A L^T + L^T A = B
    manifold = FactorPair(N)
    expected = manifold.proju(x, u)
    assert torch.allclose(u + manifold.vertical(x, corrected), expected, atol=1e-10)
    assert (u + manifold.vertical(x, published) - expected).abs().max() > 1e-3


def test_mix_is_flat_for_square_factors() -> None:
    manifold, x = FactorPair(H, "mix"), normal(0, 2 * H, H)
    u = manifold.proju(x, 0.02 * normal(1, 2 * H, H))
    curve, product = manifold.geodesic(x, u), lambda y: split(y, H)[0] @ split(y, H)[1].mT
    start, end = product(x), product(curve(1.0))
    for t in (0.25, 0.6):
        assert torch.allclose(product(curve(t)), start + t * (end - start), atol=1e-8)
    tall = FactorPair(N, "mix")
    y = normal(2, N + M, H)
    bent = tall.geodesic(y, tall.proju(y, 0.2 * normal(3, N + M, H)))
    w = [split(bent(t), N)[0] @ split(bent(t), N)[1].mT for t in (0.0, 0.5, 1.0)]
    assert (w[1] - 0.5 * (w[0] + w[2])).abs().max() > 1e-3  # not flat


def test_mix_of_scalars_is_a_square_root_and_ends() -> None:
    manifold = FactorPair(1, "mix")
    x = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    b = -0.4
    curve = manifold.geodesic(x, b * x)  # both factors grow by sqrt(1 + 2 b t)
    for t in (0.3, 1.0, 1.2):
        assert torch.allclose(curve(t), x * math.sqrt(1 + 2 * b * t), atol=1e-9)
    with pytest.raises(ValueError, match="leaves the domain"):
        curve(1.3)
    pair = torch.stack([x, x])
    both = manifold.frame(pair).curve(manifold.frame(pair).coordinates(torch.stack([-0.1 * x, -2 * x])), 1.0, "exact")
    assert torch.isfinite(both[0]).all() and torch.isnan(both[1]).all()  # one pair lost, the other unharmed


def test_inv_is_complete_where_mix_ends() -> None:
    x = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    assert torch.allclose(FactorPair(1).geodesic(x, -2.0 * x)(1.0), x * math.exp(-2.0), atol=1e-12)


@pytest.mark.parametrize("metric", ["inv", "mix"])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_everything_is_invariant_along_the_orbit(metric: str, scale: float) -> None:
    manifold, x, a = FactorPair(N, metric, eps=0.05), normal(0, N + M, H), scale * normal(1, H, H)
    u, v = normal(2, N + M, H), normal(3, N + M, H)
    at = lambda w: manifold.act(w, a)  # noqa: E731
    for relaxed in (0.0, 0.05):
        manifold = FactorPair(N, metric, eps=relaxed)
        assert torch.allclose(manifold.inner(at(x), at(u), at(v)), manifold.inner(x, u, v), rtol=1e-8)
        assert torch.allclose(at(manifold.proju(x, u)), manifold.proju(at(x), at(u)), rtol=1e-7, atol=1e-9)
    moved = at(x)
    euclidean = [(w * w).sum() for w in (u, at(u))]
    assert (euclidean[0] / euclidean[1] - 1).abs() > 1e-1 and (moved - x).norm() > 0.1


@pytest.mark.parametrize("metric", ["inv", "mix"])
def test_the_relaxation_is_covariant_and_adding_eps_is_not(metric: str) -> None:
    x, a, u = 0.05 * normal(0, N + M, H), normal(1, H, H), normal(2, N + M, H)
    manifold = FactorPair(N, metric, eps=1e-2)
    relaxed = RelaxedMetric(N, metric, 1e-2)
    assert torch.allclose(manifold.inner(x, u), relaxed.inner(x, u, u), rtol=1e-9)

    def plain(x: Tensor, u: Tensor) -> Tensor:
        p_g, p_h = (gram(side) + 1e-2 * torch.eye(H, dtype=torch.float64) for side in split(x, N))
        p_g, p_h = (torch.linalg.inv(p_g), torch.linalg.inv(p_h)) if metric == "inv" else (p_h, p_g)
        u_g, u_h = split(u, N)
        return (u_g @ p_g * u_g).sum() + (u_h @ p_h * u_h).sum()

    assert torch.allclose(manifold.inner(manifold.act(x, a), manifold.act(u, a)), manifold.inner(x, u), rtol=1e-9)
    assert (plain(manifold.act(x, a), manifold.act(u, a)) / plain(x, u) - 1).abs() > 1e-3


@pytest.mark.parametrize("metric", ["inv", "mix"])
def test_relaxed_geodesic_keeps_its_speed(metric: str) -> None:
    manifold, x = FactorPair(3, metric, eps=0.1), normal(0, 5, 2)
    u = manifold.proju(x, 0.1 * normal(1, 5, 2))
    curve, h = manifold.geodesic(x, u), 1e-3
    velocity = (curve(1.0 + h) - curve(1.0 - h)) / (2 * h)
    assert torch.allclose(manifold.norm(curve(1.0), velocity), manifold.norm(x, u), rtol=1e-5)
    third = [(curve(s) - manifold.geodesic(x, u, "taylor2")(s)).norm() for s in (0.2, 0.4)]
    assert 2.6 < math.log2(float(third[1] / third[0])) < 3.4


def test_rank_deficient_pairs_are_reported_and_finite() -> None:
    x = normal(0, 3, N + M, H)
    x[1, :N, 0] = 0  # a column of G
    x[2] = 0
    for metric in ("inv", "mix"):
        manifold = FactorPair(N, metric)
        frame, u = manifold.frame(x), normal(1, 3, N + M, H)
        assert frame.deficient.tolist() == [False, True, True]
        horizontal = manifold.proju(x, u)
        assert torch.isfinite(horizontal).all() and torch.isfinite(manifold.inner(x, u)).all()
        for method in ("exact", "taylor2", "linear"):
            z = frame.project(frame.coordinates(0.1 * u)).requires_grad_()
            end = frame.curve(z, 1.0, method, bound=10.0)
            (slope,) = torch.autograd.grad(end.square().sum(), z)
            assert torch.isfinite(end).all() and torch.isfinite(slope).all()
        full = FactorPair(N, metric)
        assert torch.allclose(full.proju(x[:1], u[:1]), horizontal[:1], atol=1e-12)  # neighbours are not disturbed


def test_balanced_gauge_is_unique_and_balanced() -> None:
    x, a = normal(0, 2, N + M, H, dtype=torch.complex128), normal(1, 2, H, H, dtype=torch.complex128)
    manifold = FactorPair(N)
    point = manifold.projx(x)
    g, h = split(point, N)
    assert torch.allclose(gram(g), gram(h), atol=1e-12)
    assert torch.allclose(g @ h.mH, split(x, N)[0] @ split(x, N)[1].mH, atol=1e-12)
    assert torch.allclose(manifold.projx(manifold.act(x, a)), point, atol=1e-9)
    assert (x - point).norm() > 0.1


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="rows must be at least 1; got 0"):
        FactorPair(0)
    with pytest.raises(ValueError, match="metric must be one of inv, mix; got 'euclid'"):
        FactorPair(2, "euclid")
    with pytest.raises(ValueError, match="eps must be finite and >= 0; got nan"):
        FactorPair(2, eps=float("nan"))
    with pytest.raises(ValueError, match=r"more than rows = 4 rows; got shape \(3, 2\)"):
        FactorPair(4).proju(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="got 'rk4'"):
        FactorPair(1).geodesic(torch.ones(2, 1), torch.ones(2, 1), "rk4")
    with pytest.raises(ValueError, match="2 entries are not finite"):
        eigh(torch.tensor([[float("nan"), 0.0], [0.0, float("inf")]]))


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 7.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_expm_is_the_matrix_exponential(size: float, dtype: torch.dtype) -> None:
    a = normal(0, 4, 5, 5)
    a = size * a / torch.linalg.matrix_norm(a, 2, keepdim=True)
    exact = torch.matrix_exp(a)
    for bound in (None, size):
        error = (expm(a.to(dtype), bound).double() - exact).abs().max() / exact.abs().max()
        assert error < 50 * torch.finfo(dtype).eps * max(1.0, size)


def test_small_algebra() -> None:
    b, a = (gram(normal(seed, 9, size)) for seed, size in ((0, 4), (1, 3)))
    c = normal(2, 3, 4)
    x = sylvester(a, b, c)
    assert torch.allclose(a @ x + x @ b, c, atol=1e-10)
    root = square_root(a)
    assert torch.allclose(root @ root, a, rtol=1e-10)
    assert divide(torch.ones(2, 2), torch.tensor([[0.0, 2.0], [1.0, 4.0]])).tolist() == [[0.0, 0.5], [1.0, 0.25]]
    g, h = normal(3, N, H), normal(4, M, H)
    result = balance(g, h)
    assert torch.allclose(result.spectrum, torch.linalg.svdvals(g @ h.mT)[:H], atol=1e-12)
    assert torch.allclose(result.gauge @ result.inverse, torch.eye(H, dtype=torch.float64), atol=1e-12)


def test_integrator_against_a_closed_form() -> None:
    """The harmonic oscillator, and 1/(1 - t), which does not reach t = 2."""
    start = torch.tensor([[[1.0]], [[0.0]]], dtype=torch.float64).reshape(1, 2, 1, 1)

    def oscillator(state: Tensor) -> Tensor:
        return torch.stack([state[..., 1, :, :], -state[..., 0, :, :]], dim=-3)

    end = integrate(oscillator, start, 3.0)
    assert torch.allclose(end.flatten(), torch.tensor([math.cos(3.0), -math.sin(3.0)], dtype=torch.float64), atol=1e-9)
    square = torch.tensor([1.0, 0.1], dtype=torch.float64).reshape(2, 1, 1, 1)
    result = integrate(lambda y: y * y, square, 2.0).flatten()
    assert torch.isnan(result[0]) and torch.allclose(result[1], torch.tensor(0.1 / 0.8, dtype=torch.float64))
