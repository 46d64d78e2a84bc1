"""Reparametrizations: what is invariant at critical points, what everywhere, and what is not."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hessian_cases import (
    christoffel_of,
    dense_gradient,
    dense_hessian,
    error,
    flat,
    mlp,
    normal,
    unflat,
)
from networks import params_of
from torch import Tensor, nn

from symgeo import ParameterManifold
from symgeo.functional import Params
from symgeo.hessian import (
    Reparametrization,
    euclidean_hessian,
    fisher_metric,
    invariant_hessian,
    kronecker_metric,
    laplace_evidence,
    model_loss,
    pullback_metric,
)

TURN = torch.eye(5, dtype=torch.float64) + 0.3 * normal(5, 5, seed=40)


def each(function: Callable[[Tensor], Tensor]) -> Callable[[Params], Params]:
    return lambda p: {name: function(x) for name, x in p.items()}


def _turned(p: Params) -> Params:
    return {name: (TURN @ x.sinh() if name == "0.bias" else x.sinh()) for name, x in p.items()}


def _turned_back(p: Params) -> Params:
    return {name: (torch.linalg.solve(TURN, x) if name == "0.bias" else x).asinh() for name, x in p.items()}


MAPS = {
    "softplus": Reparametrization(each(lambda x: (x + 2).expm1().log()), each(lambda y: nn.functional.softplus(y) - 2)),
    "log": Reparametrization(each(lambda x: (x + 4).log()), each(lambda y: y.exp() - 4)),
    "sinh": Reparametrization(_turned, _turned_back),
}
LOSS = model_loss(mlp(2), "mse")


def setting(critical: bool) -> tuple[Params, list[tuple[Tensor, Tensor]]]:
    """The parameters and data whose targets they attain (an exact critical point), or miss."""
    params, x = params_of(mlp(2)), normal(19, 3, seed=5)
    y = LOSS.outputs(params, (x, None)).detach()
    return params, [(x, y if critical else y + normal(19, 2, seed=6))]


def metric_of(data: list[tuple[Tensor, Tensor]]) -> Callable[[Params], Tensor]:
    """Gauss-Newton plus a tenth of the identity: not constant."""
    fisher = fisher_metric(LOSS, data)
    return lambda p: fisher(p) + 0.1 * torch.eye(32, dtype=torch.float64)


@pytest.mark.parametrize("name", MAPS)
def test_at_a_critical_point_everything_is_invariant(name: str) -> None:
    """Spectrum, trace, log-determinant and evidence of G^-1 H; log det H itself moves by 2 log |det K|."""
    params, data = setting(critical=True)
    there, metric = MAPS[name], metric_of(data)
    new, loss = there.push(params), there.loss(LOSS)
    for connection in (True, False):
        a = invariant_hessian(LOSS, params, data, metric, connection)
        b = invariant_hessian(loss, new, data, there.metric(metric), connection)
        assert error(b.eigvalsh(), a.eigvalsh()) <= 1e-6
        assert b.trace().value == pytest.approx(a.trace().value, rel=1e-6)
        assert b.logdet().value == pytest.approx(a.logdet().value, rel=1e-6)
        evidence = [laplace_evidence(0.3, op, count=19) for op in (a, b)]
        assert evidence[1] == pytest.approx(evidence[0], rel=1e-6)
    plain, moved = euclidean_hessian(LOSS, params, data), euclidean_hessian(loss, new, data)
    assert error(moved.eigvalsh(), plain.eigvalsh()) > 1e-1
    k = torch.autograd.functional.jacobian(lambda y: flat(there.inverse(unflat(y, new))), flat(new))
    shift = 2 * float(torch.linalg.slogdet(k).logabsdet)
    assert moved.logdet() - plain.logdet() == pytest.approx(shift, rel=1e-6) and abs(shift) > 1
    assert abs(laplace_evidence(0.3, moved) - laplace_evidence(0.3, plain)) > 1


@pytest.mark.parametrize("name", MAPS)
def test_anywhere_the_covariant_spectrum_is_invariant(name: str) -> None:
    """And G^-1 d2L, without the connection, is not."""
    params, data = setting(critical=False)
    there, metric = MAPS[name], metric_of(data)
    new, loss = there.push(params), there.loss(LOSS)
    a, b = invariant_hessian(LOSS, params, data, metric), invariant_hessian(loss, new, data, there.metric(metric))
    assert error(b.eigvalsh(), a.eigvalsh()) <= 1e-10
    assert error(b.eigvalsh(3), a.eigvalsh()[-3:]) <= 1e-8
    plain = [invariant_hessian(*args, connection=False).eigvalsh()
             for args in ((LOSS, params, data, metric), (loss, new, data, there.metric(metric)))]
    assert error(plain[1], plain[0]) > 1e-2


def test_it_is_the_textbook_formula() -> None:
    """G^-1/2 (d2L - Gamma dL) G^-1/2 entry by entry, the map of tangent vectors, and orthonormal eigenvectors."""
    params, data = setting(critical=False)
    metric = metric_of(data)
    operator, g = invariant_hessian(LOSS, params, data, metric), metric(params)
    gamma = christoffel_of(lambda x: metric(unflat(x, params)), flat(params))
    hessian = dense_hessian(LOSS, params, data)
    covariant = hessian - torch.einsum("k,kij->ij", dense_gradient(LOSS, params, data), gamma)
    values, vectors = torch.linalg.eigh(g)
    root = vectors @ values.rsqrt().diag() @ vectors.T
    assert error(operator.dense(), root @ covariant @ root) <= 1e-10
    u = normal(32, seed=3)
    assert error(flat(operator @ unflat(u, params)), torch.linalg.solve(g, covariant @ u)) <= 1e-10
    pairs = operator.eigh(2, "SA")
    found = torch.stack([flat(v) for v in pairs.vectors], dim=1)
    assert error(found.T @ g @ found, torch.eye(2, dtype=torch.float64)) <= 1e-9
    assert error(covariant @ found, g @ found * pairs.values) <= 1e-7
    assert error(operator.dense(), root @ hessian @ root) > 1e-2


def adaptive(params: Params) -> Tensor:
    return flat(params).pow(-2)


def test_forms_of_a_metric_agree() -> None:
    """Diagonal and dense, constant and function, Kronecker and dense, a manifold and its diagonal."""
    params, data = setting(critical=False)
    spectrum = lambda metric, **options: invariant_hessian(LOSS, params, data, metric, **options).eigvalsh()  # noqa: E731
    reference = spectrum(adaptive)
    assert error(spectrum(lambda p: adaptive(p).diag()), reference) <= 1e-10
    assert error(spectrum(ParameterManifold(params)), reference) <= 1e-10
    constant = spectrum(adaptive(params))
    assert error(constant, spectrum(adaptive, connection=False)) <= 1e-10
    assert error(constant, spectrum(adaptive(params).diag())) <= 1e-10
    assert error(constant, reference) > 1e-2

    def factors(p: Params) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        w = p["0.weight"]
        eye = lambda n: torch.eye(n, dtype=w.dtype)  # noqa: E731
        return {"0.weight": (w @ w.T + eye(5), w.T @ w + 0.5 * eye(3)), "2.bias": (None, 3 * eye(2)),
                "2.weight": (torch.diag(p["2.bias"] ** 2 + 1), None)}

    def dense(p: Params) -> Tensor:
        f, eye = factors(p), torch.eye(5, dtype=torch.float64)
        return torch.block_diag(torch.kron(*f["0.weight"]), eye, torch.kron(f["2.weight"][0], eye), f["2.bias"][1])

    for connection in (True, False):
        a = invariant_hessian(LOSS, params, data, kronecker_metric(factors), connection)
        b = invariant_hessian(LOSS, params, data, dense, connection)
        assert error(a.eigvalsh(), b.eigvalsh()) <= 1e-10
        u = unflat(normal(32), params)
        assert error(flat(a @ u), flat(b @ u)) <= 1e-10


def test_weight_norm_through_the_pseudo_inverse() -> None:
    """w = g v / |v| is no bijection: J^T J has rank 3 of 4, and the nonzero eigenvalues are those of H_w."""
    def to_weight(p: Params) -> Tensor:
        return p["g"] * p["v"] / p["v"].norm()

    target, scales = normal(3, seed=1), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)

    def plain(p: Params, batch: Any) -> Tensor:
        gap = p["w"] - target
        return (scales * gap**2).sum() + gap.sum() ** 4 + batch * gap.prod()

    loss = lambda p, batch: plain({"w": to_weight(p)}, batch)  # noqa: E731
    params = {"g": target.norm().reshape(1), "v": 2.5 * target}
    operator = invariant_hessian(loss, params, [1.0], pullback_metric(to_weight), connection=False, pinv=True)
    assert operator.shape == (3, 3)
    assert error(operator.eigvalsh(), (2 * scales).sort().values) <= 1e-10
    assert operator.logdet() == pytest.approx(float((2 * scales).log().sum()), rel=1e-10)
    off = {"g": params["g"] + 0.3, "v": params["v"] + normal(3, seed=2)}  # anywhere, with the connection
    covariant = invariant_hessian(loss, off, [1.0], pullback_metric(to_weight), pinv=True)
    exact = dense_hessian(plain, {"w": to_weight(off)}, [1.0])
    assert error(covariant.eigvalsh(), torch.linalg.eigvalsh(exact)) <= 1e-10
    with pytest.raises(ValueError, match="metric: singular, 1 of 4 eigenvalues are zero to rounding; .* pinv=True"):
        invariant_hessian(loss, params, [1.0], pullback_metric(to_weight))
    flat_metric = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert invariant_hessian(loss, params, [1.0], flat_metric, pinv=True).shape == (3, 3)


def test_gradients_and_densities_move_with_the_coordinates() -> None:
    params, data = setting(critical=False)
    for there in MAPS.values():
        new = there.push(params)
        slope = unflat(dense_gradient(LOSS, params, data), params)
        moved = flat(there.gradient(params, slope))
        assert error(moved, dense_gradient(there.loss(LOSS), new, data)) <= 1e-10
        metric = metric_of(data)
        norms = [float(g @ torch.linalg.solve(m, g)) for g, m in
                 ((flat(slope), metric(params)), (moved, there.metric(metric)(new)))]
        assert norms[1] == pytest.approx(norms[0], rel=1e-10)
        density = lambda p: -flat(p).square().sum() / 2  # noqa: E731
        volumes = [torch.linalg.slogdet(m).logabsdet / 2 for m in (metric(params), there.metric(metric)(new))]
        scalars = [float(density(params) - volumes[0]), float(there.density(density)(new) - volumes[1])]
        assert scalars[1] == pytest.approx(scalars[0], rel=1e-10)
        assert abs(float(there.density(density)(new) - density(params))) > 1e-1
    new, metrics = MAPS["log"].push(params), [MAPS["log"].metric(m) for m in (adaptive, adaptive(params))]
    assert error(metrics[0](new), metrics[1](new)) <= 1e-12


def test_pull_back_with_an_inner_metric() -> None:
    """The pull-back of a metric along a composition is the pull-back of the pull-back."""
    params = {"a": normal(3)}
    inner = pullback_metric(lambda p: p["b"].exp())
    outer = pullback_metric(lambda p: {"b": p["a"] ** 3}, inner)
    assert error(outer(params), pullback_metric(lambda p: (p["a"] ** 3).exp())(params)) <= 1e-12
    with pytest.raises(ValueError, match="the map must return Params"):
        pullback_metric(lambda p: p["a"], inner)(params)


def test_evidence_is_the_integral_of_a_gaussian() -> None:
    """Exact for a quadratic: the integral up to (2 pi)^(d/2); refused where there is no minimum."""
    h = torch.tensor([2.0, 3.0], dtype=torch.float64)
    loss = lambda p, batch: 0.25 + (h * p["w"] ** 2).sum() / 2  # noqa: E731
    operator = invariant_hessian(loss, {"w": torch.zeros(2, dtype=torch.float64)}, [0], torch.ones(2))
    evidence = laplace_evidence(0.25, operator, count=7)
    assert evidence == pytest.approx(-7 * 0.25 - 0.5 * float((7 * h).log().sum()), rel=1e-12)
    assert pickle.loads(pickle.dumps(evidence)).stderr == 0.0
    zero = {"w": torch.zeros(2, dtype=torch.float64)}
    saddle = invariant_hessian(lambda p, b: p["w"].prod(), zero, [0], torch.ones(2))
    for samples in (None, 5):
        with pytest.raises(ValueError, match="needed a positive definite .*; it has an eigenvalue at or below -1"):
            laplace_evidence(0.0, saddle, samples=samples)
    many = laplace_evidence(0.25, operator, count=7, samples=5)
    assert abs(many - evidence) <= 4 * many.stderr + 1e-9
    with pytest.raises(ValueError, match="count must be positive; got 0"):
        laplace_evidence(0.0, operator, count=0)


BAD: dict[str, Any] = {
    "metric: indefinite, with eigenvalue -1": -torch.ones(32, dtype=torch.float64),
    r"metric: needed a matrix \(32, 32\) or a diagonal \(32,\) for 32 parameters; got \(3, 3\)": torch.eye(3),
    "metric: the matrix is not symmetric": torch.ones(32, 32).triu(),
    "metric: needed finite entries": torch.full((32,), float("inf")),
    "metric must be a tensor, a function of Params, a Metric or a ParameterManifold; got str": "fisher",
    "metric: singular, 32 of 32": torch.zeros(32),
    "metric: 'w' is not a parameter": kronecker_metric({"w": (None, None)}),
    r"metric: the left factor of '0.weight' must be \(5, 5\); got \(3, 3\)":
        kronecker_metric({"0.weight": (torch.eye(3), None)}),
    "metric, right factor of '0.bias': singular, 1 of 5":
        kronecker_metric({"0.bias": (None, torch.diag(torch.tensor([0.0, 1, 1, 1, 1])))}),
    "got float": lambda p: 1.0,
}


@pytest.mark.parametrize("message", BAD)
def test_bad_metrics_are_one_clear_error(message: str) -> None:
    params, data = setting(critical=False)
    with pytest.raises(ValueError, match=message) as caught:
        invariant_hessian(LOSS, params, data, BAD[message])
    assert "\n" not in str(caught.value)


def test_maps_that_are_not_inverse_are_refused() -> None:
    params = {"w": normal(3)}
    with pytest.raises(ValueError, match="inverse does not undo forward: 'w' comes back changed by"):
        Reparametrization(each(torch.exp), each(torch.sqrt)).push(params)
    with pytest.raises(ValueError, match="inverse\\(forward\\(params\\)\\) lacks 'w'"):
        Reparametrization(each(torch.exp), lambda p: {"v": p["w"].log()}).push(params)
