"""The formulas and searches of the figures, against autograd, brute-force search and the package."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from paper_figs import _beta_space, _closed_forms
from symgeo import ParameterManifold, geodesic_sharpness

FIGURES = Path(__file__).parent.parent / "paper_figs"
D, N = 5, 3
TARGET = 0.7


def inverse_metric(name: str) -> Callable[[Tensor], Tensor]:
    weights = {"inv": lambda t: 1 / t**2, "mix": lambda t: t.flip(0) ** 2, "euclidean": torch.ones_like}
    return lambda t: 1 / weights[name](t)


def covariant_hessian(name: str, point: Tensor) -> Tensor:
    """d2L - Gamma dL for a diagonal metric g, with the Christoffel symbols of autograd."""

    def loss(t: Tensor) -> Tensor:
        return (t[0] * t[1] - TARGET) ** 2

    inverse = inverse_metric(name)
    partial = torch.func.jacrev(lambda t: torch.diag(1 / inverse(t)))(point)  # [i, j, k] = d_k g_ij
    lowered = 0.5 * (partial + partial.transpose(1, 2) - partial.permute(2, 1, 0))  # [i, j, k] = Gamma_{i,jk}
    christoffel = inverse(point)[:, None, None] * lowered
    gradient = torch.func.grad(loss)(point)
    return torch.func.hessian(loss)(point) - torch.einsum("ijk,i->jk", christoffel, gradient)


@pytest.mark.parametrize("name", ["euclidean", "inv", "mix"])
def test_scalar_net_against_autograd(name: str) -> None:
    point = torch.tensor([1.3, -0.4], dtype=torch.float64)
    formulas = _closed_forms.scalar_net(*point.numpy()[:, None], TARGET)
    gradient = torch.func.grad(lambda t: (t[0] * t[1] - TARGET) ** 2)(point)
    inverse = inverse_metric(name)(point)
    norm = (gradient**2 * inverse).sum().sqrt()
    assert formulas[f"{name} gradient norm"] == pytest.approx(float(norm), rel=1e-12)
    hessian = covariant_hessian(name, point)
    if name == "mix":  # the horizontal direction (u, v), of unit length
        unit = point / (point**2 / inverse).sum().sqrt()
        trace = unit @ hessian @ unit
    else:
        trace = (hessian.diagonal() * inverse).sum()
    assert formulas[f"{name} hessian trace"] == pytest.approx(float(trace), rel=1e-12)


def test_inv_trace_does_not_vanish_at_the_minimum() -> None:
    def trace(p: float) -> float:
        return float(_closed_forms.scalar_net(np.array([p]), np.ones(1), TARGET)["inv hessian trace"][0])

    assert trace(TARGET) == pytest.approx(4 * TARGET**2)
    assert trace(TARGET / 2) == pytest.approx(0, abs=1e-15)
    assert trace(TARGET / 4) == pytest.approx(-(TARGET**2) / 2)


def case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    beta = generator.uniform(0.5, 1.5, D) * generator.choice([-1.0, 1.0], D)
    x = generator.standard_normal((N, D))
    return beta, x, x @ beta + 0.2 * generator.standard_normal(N)


def orthonormal(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    beta, _, _ = case(seed)
    target = beta + 0.3 * np.random.default_rng(seed + 1).standard_normal(D)
    x = np.sqrt(D) * np.eye(D)  # so that |X beta - y|^2 / n is |beta - target|^2
    return beta, target, x, x @ target


def brute(loss: Callable[[np.ndarray], float], size: int, radius: float) -> float:
    """Largest loss over the ball, by quasi-Newton from random starts, on the sphere and inside."""
    generator = np.random.default_rng(0)

    def inside(z: np.ndarray) -> np.ndarray:
        return radius * z / max(1.0, float(np.linalg.norm(z)))

    def on_sphere(z: np.ndarray) -> np.ndarray:
        return radius * z / float(np.linalg.norm(z))

    found = []
    for _ in range(12):
        start = generator.standard_normal(size)
        for place in (inside, on_sphere):
            found.append(-minimize(lambda z, place=place: -loss(place(z)), start, options={"gtol": 1e-9}).fun)
    return max(found)


@pytest.mark.parametrize("rho", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_inv_and_adaptive_against_brute_force(seed: int, rho: float) -> None:
    beta, x, y = case(seed)
    start = float(_beta_space.loss(beta, x, y))
    inv = brute(lambda b: float(_beta_space.loss(beta * np.exp(2 * b), x, y)) - start, D, rho / np.sqrt(2))
    assert _beta_space.inv(beta, x, y, rho) == pytest.approx(inv, rel=1e-6)

    def moved(z: np.ndarray) -> float:
        return float(_beta_space.loss(beta * (1 + z[:D]) * (1 + z[D:]), x, y)) - start

    assert _beta_space.adaptive(beta, x, y, rho) == pytest.approx(brute(moved, 2 * D, rho), rel=1e-6)


@pytest.mark.parametrize("rho", [0.05, 0.4, 1.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_mix_against_brute_force(seed: int, rho: float) -> None:
    beta, x, y = case(seed)
    start = float(_beta_space.loss(beta, x, y))
    radius, sign = np.sqrt(2) * rho, np.sign(beta)

    def shortened(z: np.ndarray) -> float:
        d = radius * z / max(1.0, float(np.linalg.norm(z)))
        return float(_beta_space.loss(beta + sign * np.maximum(sign * d, -np.abs(beta)), x, y)) - start

    generator = np.random.default_rng(3)
    found = max(-minimize(lambda z: -shortened(z), generator.standard_normal(D)).fun for _ in range(12))
    value = _beta_space.mix(beta, x, y, rho)
    assert value >= found * (1 - 1e-6)
    unbounded = _closed_forms.mix_unbounded(beta, x, y, rho)
    assert value <= unbounded * (1 + 1e-9)
    if radius < np.abs(beta).min():  # no coordinate can reach zero
        assert value == pytest.approx(unbounded, rel=1e-9)
        assert value == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("rho", [1e-3, 1e-2, 1e-1])
def test_orthonormal_closed_forms(rho: float) -> None:
    beta, target, x, y = orthonormal(4)
    exact = _closed_forms.mix_orthonormal(beta, target, rho)
    assert _beta_space.mix(beta, x, y, rho) == pytest.approx(exact, rel=1e-9)
    assert _closed_forms.mix_unbounded(beta, x, y, rho) == pytest.approx(exact, rel=1e-9)
    second = _closed_forms.inv_second_order(beta, target, rho)
    assert _beta_space.inv(beta, x, y, rho) == pytest.approx(second, rel=2.5 * rho**2)


def test_inv_at_the_optimum_is_twice_the_largest_coordinate() -> None:
    beta, _, x, _ = orthonormal(5)
    rho = 1e-3
    value = _beta_space.inv(beta, x, x @ beta, rho)
    assert value == pytest.approx(2 * rho**2 * (beta**2).max(), rel=2e-3)
    assert _closed_forms.inv_second_order(beta, beta, rho) == pytest.approx(2 * rho**2 * (beta**2).max(), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_trust_region_against_brute_force(seed: int) -> None:
    generator = np.random.default_rng(seed)
    linear, curvature = generator.standard_normal((2, D))
    if seed == 1:
        linear[curvature.argmax()] = 0.0  # the hard case, for a large radius
    if seed == 2:
        curvature = -np.abs(curvature) - 1  # the maximiser is inside
    value = _closed_forms.trust_region(linear, curvature, 3.0)
    assert value == pytest.approx(brute(lambda b: float(linear @ b + curvature @ b**2), D, 3.0), rel=1e-7)


def test_taylor_polynomial_agrees_where_the_geodesic_is_short() -> None:
    beta, x, y = case(6)
    exact, polynomial = (f(beta, x, y, 1e-3) for f in (_beta_space.mix, _beta_space.mix_taylor2))
    assert polynomial == pytest.approx(exact, rel=1e-5)
    assert polynomial != exact
    with pytest.raises(ValueError, match="beta0: needed no zero coordinate"):
        _beta_space.mix_taylor2(np.array([1.0, 0.0]), np.eye(2), np.ones(2), 0.1)


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A figure's functions; as a script it finds its neighbours in its own folder."""
    monkeypatch.syspath_prepend(FIGURES)
    return importlib.import_module(name)


def test_only_euclidean_quantities_vary_along_orbits(monkeypatch: pytest.MonkeyPatch) -> None:
    level_sets = script("level_sets", monkeypatch)
    for name in _closed_forms.scalar_net(np.ones(1), np.ones(1), TARGET):
        varies = max(level_sets.variation_along_orbits(name, 60).values())
        assert varies > 0.1 if name.startswith("euclidean") else varies < 1e-12


@pytest.mark.parametrize("rho", [1e-2, 0.05])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_package_agrees_with_the_search_over_beta(seed: int, rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from minima, in any gauge, and inside the domain of mix; by two searches that share no code."""
    nets = script("diagonal_nets", monkeypatch)
    beta, x, y = case(seed)
    u = np.random.default_rng(seed + 7).uniform(0.1, 10.0, D)
    task = nets.Problem(x, y, beta)
    found, over_beta = nets.measure(u, beta / u, task, rho), nets.measure_beta(beta, task, rho)
    params = {"u": torch.from_numpy(u), "v": torch.from_numpy(beta / u)}
    batches, mix = [(torch.from_numpy(x), torch.from_numpy(y))], ParameterManifold(params, nets.SYMMETRY, "mix")
    found["mix"] = geodesic_sharpness(nets.train_loss, params, batches, mix, rho, steps=nets.STEPS).value
    for name, value in over_beta.items():
        if name == "mix_taylor2":  # has higher maxima far away, which a climb from the origin does not see
            assert value * (1 + 1e-9) >= found[name] > 0.9 * over_beta["mix"]
        else:
            assert found[name] == pytest.approx(value, rel=1e-6)


def test_trained_nets_fit_and_the_package_is_a_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a minimum there are maxima near xi and near -xi; the search looks at both sides."""
    nets, rho = script("diagonal_nets", monkeypatch), 1e-3
    task = nets.problem(0)
    trained = nets.train(task, 4, 0)
    assert len(trained.beta) == 4
    assert _beta_space.loss(trained.beta, task.x, task.y).max() <= nets.TOLERANCE
    for u, v in zip(trained.u, trained.v):
        found, over_beta = nets.measure(u, v, task, rho), nets.measure_beta(u * v, task, rho)
        for name in ("adaptive", "inv"):
            assert over_beta[name] * (1 + 1e-9) >= found[name] >= over_beta[name] * (1 - 1e-4)
