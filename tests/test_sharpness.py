"""Sharpness: closed forms, independent searches, invariance with its negative control, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from networks import bert, language_loss, llama, params_of, randomise
from torch import Tensor, nn

from paper_figs import _beta_space, _closed_forms
from symgeo import (
    ParameterManifold,
    Symmetry,
    SymmetryError,
    adaptive_sharpness,
    average_sharpness,
    euclidean_sharpness,
    find_symmetry,
    functional_loss,
    geodesic_sharpness,
)
from symgeo.functional import Params
from symgeo.groups import GeneralLinear, Rotary
from symgeo.sharpness.ascent import checkpoints, into_ball

DIAGONAL = Symmetry({"u": "(h e)", "v": "(h e*)"}, {"e": GeneralLinear(per="h")}, sizes={"e": 1})


def diagonal_net(seed: int = 0) -> tuple[Params, Tensor]:
    g = torch.Generator().manual_seed(seed)
    u, v, star = (torch.randn(5, generator=g, dtype=torch.float64) + shift for shift in (2.0, -2.0, 0.0))
    return {"u": u, "v": v}, star


def diagonal_loss(params: Params, target: Tensor) -> Tensor:
    return (params["u"] * params["v"] - target).square().sum()


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    g = torch.Generator().manual_seed(seed)
    model = randomise(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), seed).to(dtype)
    data = [(torch.randn(11, 5, generator=g, dtype=torch.float64).to(dtype), torch.randint(0, 3, (11,), generator=g))
            for _ in range(2)]
    return model, data


@pytest.mark.parametrize("rho", [1e-3, 1e-2, 0.1])
def test_mix_on_diagonal_nets_is_the_closed_form(rho: float) -> None:
    """S = 2 sqrt2 rho |beta_0 - beta*| + 2 rho^2 exactly, also after a diagonal gauge change."""
    params, star = diagonal_net()
    beta = params["u"] * params["v"]
    expected = 2 * math.sqrt(2) * rho * float((beta - star).norm()) + 2 * rho**2
    assert expected == pytest.approx(_closed_forms.mix_orthonormal(beta.numpy(), star.numpy(), rho), rel=1e-9)
    scale = torch.tensor([1e-2, 3.0, 1e2, 7.0, 0.1], dtype=torch.float64)
    for p in (params, {"u": params["u"] * scale, "v": params["v"] / scale}):
        result = geodesic_sharpness(diagonal_loss, p, [star], ParameterManifold(p, DIAGONAL, "mix"), rho, steps=60)
        assert result.value == pytest.approx(expected, rel=1e-6)


def test_inv_on_diagonal_nets_is_the_closed_form() -> None:
    """Exact: max over |b| <= rho / sqrt2 of sum (beta_0 e^2b - beta*)^2 - (beta_0 - beta*)^2."""
    params, star = diagonal_net()
    beta, manifold = params["u"] * params["v"], ParameterManifold(params, DIAGONAL)
    for rho, tolerance in ((1e-2, 5e-4), (0.1, 2e-2)):
        value = geodesic_sharpness(diagonal_loss, params, [star], manifold, rho, steps=80).value
        assert value == pytest.approx(_beta_space.inv(beta.numpy(), np.eye(5), star.numpy(), rho) * 5, rel=1e-6)
        second = _closed_forms.inv_second_order(beta.numpy(), star.numpy(), rho)
        assert value == pytest.approx(second, rel=tolerance)
    at_optimum = geodesic_sharpness(diagonal_loss, params, [beta], manifold, 1e-3, steps=100).value
    assert at_optimum == pytest.approx(2e-6 * float(beta.square().max()), rel=2e-3)  # not 0 at a critical point


def test_the_search_is_not_beaten_by_random_points() -> None:
    """A lower bound of the maximum that a thousand random points of the sphere do not exceed."""
    params, star = diagonal_net(3)
    manifold = ParameterManifold(params, DIAGONAL)
    chart, g = manifold.chart(params), torch.Generator().manual_seed(0)
    best = geodesic_sharpness(diagonal_loss, params, [star], manifold, 0.5, steps=60).value
    base = float(diagonal_loss(params, star))
    for _ in range(1000):
        z = chart.random(g)
        point = chart.point(z * (0.5 / z.norm()))
        assert float(diagonal_loss(point, star)) - base <= best * (1 + 1e-9)


@pytest.mark.parametrize("metric", ["inv", "mix"])
@pytest.mark.parametrize("geodesic", ["exact", "taylor2", "linear"])
def test_what_is_returned_is_attained(metric: str, geodesic: str) -> None:
    model = bert(1)
    loss, data = language_loss(model, labels=3)
    params = params_of(model)
    manifold = ParameterManifold(params, find_symmetry(model), metric)
    result = geodesic_sharpness(loss, params, data, manifold, 0.2, steps=6, geodesic=geodesic, keep=True)
    assert result.perturbations is not None and len(result.per_batch) == len(data) == 2
    assert result.value == pytest.approx(sum(result.per_batch) / 2)
    for value, xi, batch, base in zip(result.per_batch, result.perturbations, data, result.base_losses):
        reached = float(loss(manifold.geodesic(params, xi, geodesic)(1.0), batch))
        assert reached - base == pytest.approx(value, abs=1e-9)
        assert float(manifold.norm(params, xi)) <= 0.2 * (1 + 1e-9)
        horizontal = manifold.horizontal(params, xi)
        assert all(torch.allclose(horizontal[name], xi[name], atol=1e-8) for name in xi)
        assert value > 0
    assert all(len(row) == 7 for row in result.history)
    assert result.to_dict()["value"] == result.value


def test_monotone_in_rho_and_first_order_is_the_gradient_norm() -> None:
    model = bert(1)
    loss, data = language_loss(model, labels=3)
    params = params_of(model)
    manifold = ParameterManifold(params, find_symmetry(model))
    radii = (0.0, 0.05, 0.1, 0.3)
    values = [geodesic_sharpness(loss, params, data[:1], manifold, rho, steps=10).value for rho in radii]
    assert values[0] == 0 and values == sorted(values) and values[1] > 0
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    gradients = torch.autograd.grad(loss(leaves, data[0]), list(leaves.values()), allow_unused=True)
    egrad = {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(params.items(), gradients)}
    slope = float(manifold.norm(params, manifold.rgrad(params, egrad)))
    small = geodesic_sharpness(loss, params, data[:1], manifold, 1e-5, steps=6).value
    assert small / 1e-5 == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_invariant_along_random_orbits(name: str) -> None:
    """Gaussian elements of every GL and rotary group; adaptive sharpness is the control that moves."""
    model = {"bert": bert, "llama": llama}[name]()
    loss, data = language_loss(model, labels=3 if name == "bert" else None)
    params = params_of(model)
    symmetry = find_symmetry(model)
    action = symmetry.bind(params)
    g, tolerance = torch.Generator().manual_seed(7), 1e-6 if name == "bert" else 1e-5
    draws = {}
    for key, group in action.groups.items():
        shape = action.copies[key]
        if isinstance(group, GeneralLinear):
            draws[key] = torch.randn(*shape, action.sizes[key], action.sizes[key], generator=g, dtype=torch.float64)
        elif isinstance(group, Rotary):
            draws[key] = torch.randn(*shape, action.sizes[key] // 2, generator=g, dtype=torch.complex128)
    moved = action.act(action.element(draws), params)
    assert float(loss(moved, data[0])) == pytest.approx(float(loss(params, data[0])), rel=1e-6)
    for metric in ("inv", "mix"):
        manifold = ParameterManifold(params, symmetry, metric)
        before, after = (geodesic_sharpness(loss, p, data[:1], manifold, 0.3, steps=8).value for p in (params, moved))
        assert after == pytest.approx(before, rel=tolerance)
    before, after = (adaptive_sharpness(loss, p, data[:1], 0.3, steps=8).value for p in (params, moved))
    assert abs(after / before - 1) > 0.1


def test_invariant_under_relu_scaling_and_permutation_too() -> None:
    model, data = mlp()
    loss, params = functional_loss(model, nn.functional.cross_entropy), params_of(model)
    scale = torch.linspace(0.1, 9.0, 7, dtype=torch.float64)
    moved = params | {"0.weight": params["0.weight"] * scale[:, None], "0.bias": params["0.bias"] * scale,
                      "2.weight": params["2.weight"] / scale}
    moved = moved | {"0.weight": moved["0.weight"].flip(0), "0.bias": moved["0.bias"].flip(0),
                     "2.weight": moved["2.weight"].flip(1)}
    pairs = [(adaptive_sharpness(loss, p, data, 0.2).value, euclidean_sharpness(loss, p, data, 0.2).value)
             for p in (params, moved)]
    assert pairs[1][0] == pytest.approx(pairs[0][0], rel=1e-9)
    assert abs(pairs[1][1] / pairs[0][1] - 1) > 0.1


def test_average_sharpness_against_its_second_order_value() -> None:
    """E[L(w + rho z) - L(w)] = rho^2 / 2 tr H for a quadratic; the seed decides the draw."""
    h = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    loss = lambda p, b: 0.5 * (h * (p["w"] - b) ** 2).sum()  # noqa: E731
    params = {"w": torch.ones(3, dtype=torch.float64)}
    result = average_sharpness(loss, params, [1.0], 0.1, samples=4000)
    assert result.standard_error is not None
    assert abs(result.value - 0.5 * 0.01 * 8) < 4 * result.standard_error < 0.01
    again = average_sharpness(loss, params, [1.0], 0.1, samples=5, seed=3)
    assert again.value == average_sharpness(loss, params, [1.0], 0.1, samples=5, seed=3).value
    assert again.value != average_sharpness(loss, params, [1.0], 0.1, samples=5, seed=4).value


def test_average_sharpness_is_invariant_with_a_manifold() -> None:
    params, star = diagonal_net()
    moved = {"u": params["u"] * 50, "v": params["v"] / 50}
    manifold = ParameterManifold(params, DIAGONAL)
    a, b = (average_sharpness(diagonal_loss, p, [star], 0.1, manifold).value for p in (params, moved))
    assert b == pytest.approx(a, rel=1e-9)
    a, b = (average_sharpness(diagonal_loss, p, [star], 0.1).value for p in (params, moved))
    assert abs(b / a - 1) > 0.1


def test_float32_and_autocast() -> None:
    model = bert(1)
    loss, data = language_loss(model, labels=3)
    params = params_of(model)
    single = {name: p.float() for name, p in params.items()}
    symmetry = find_symmetry(model)
    values = [geodesic_sharpness(loss, p, data[:1], ParameterManifold(p, symmetry), 0.3, steps=5).value
              for p in (params, single)]
    assert values[1] == pytest.approx(values[0], rel=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = geodesic_sharpness(loss, single, data[:1], ParameterManifold(single, symmetry), 0.3, steps=5, keep=True)
    assert low.value == pytest.approx(values[0], rel=0.15) and low.value != values[1]
    assert low.perturbations is not None
    assert all(x.dtype == torch.float32 for x in low.perturbations[0].values())


def test_mix_past_its_domain_is_rejected_not_believed() -> None:
    params, _ = diagonal_net()
    manifold = ParameterManifold(params, DIAGONAL, "mix")
    beyond = 3 * params["u"] * params["v"]  # the loss grows towards zero, where the metric ends
    result = geodesic_sharpness(diagonal_loss, params, [beyond], manifold, 30.0, steps=12)
    assert math.isfinite(result.value) and result.left_domain > 0
    assert any("left the domain" in note for note in result.warnings)


def test_rank_deficient_heads_and_zero_parameters_are_counted() -> None:
    model = bert(1)
    with torch.no_grad():
        layer = model.bert.encoder.layer[0]
        layer.attention.self.value.weight[:7] = 0
        layer.attention.self.value.bias[:7] = 0
        layer.output.dense.bias.zero_()
    loss, data = language_loss(model, labels=3)
    params = params_of(model)
    manifold = ParameterManifold(params, find_symmetry(model))
    result = geodesic_sharpness(loss, params, data, manifold, 0.1, steps=4, keep=True)
    assert result.relaxed == 1 and result.pairs == 6 and result.zeros == 21 and result.value > 0
    assert len(result.warnings) == 2
    assert result.perturbations is not None
    assert not result.perturbations[0]["bert.encoder.layer.0.output.dense.bias"].any()
    assert all(torch.isfinite(x).all() for x in result.perturbations[0].values())


def test_a_wrong_declaration_is_caught() -> None:
    """Without the dual the balanced point is another function."""
    params, star = diagonal_net()
    wrong = Symmetry({"u": "(h e)", "v": "(h e*)"}, {"e": GeneralLinear(per="h")}, sizes={"e": 1})
    loss = lambda p, b: (p["u"] * p["v"].square() - b).square().sum()  # noqa: E731
    with pytest.raises(SymmetryError, match="not invariant under the declared symmetry"):
        geodesic_sharpness(loss, params, [star], ParameterManifold(params, wrong), 0.1)


BAD = {
    "rho must be a finite number >= 0; got -0.1": {"rho": -0.1},
    "rho must be a finite number >= 0; got nan": {"rho": float("nan")},
    "steps must be a positive integer; got 0": {"steps": 0},
    "needed at least one batch; found none": {"batches": []},
    "batches must be an iterable of batches; got int": {"batches": 3},
    "geodesic must be one of exact, taylor2, linear; got 'ode'": {"geodesic": "ode"},
    r"must return a scalar tensor; got a tensor of shape \(5,\)": {"loss": lambda p, b: p["u"]},
    "must return a scalar tensor; got float": {"loss": lambda p, b: 1.0},
    "the loss at the parameters is nan": {"loss": lambda p, b: p["u"].sum() * float("nan")},
    r"parameter 'v' of shape \(5,\) is missing": {"params": {"u": torch.ones(5, dtype=torch.float64)}},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_error(message: str) -> None:
    params, star = diagonal_net()
    arguments = {"loss": diagonal_loss, "params": params, "batches": [star],
                 "manifold": ParameterManifold(params, DIAGONAL), "rho": 0.1} | BAD[message]
    with pytest.raises(ValueError, match=message) as caught:
        geodesic_sharpness(**arguments)
    assert "\n" not in str(caught.value)


def test_functional_loss_reads_its_batches() -> None:
    model, data = mlp()
    loss, params = functional_loss(model, nn.functional.cross_entropy), params_of(model)
    expected = nn.functional.cross_entropy(model(data[0][0]), data[0][1])
    assert torch.equal(loss(params, data[0]), expected)
    doubled = loss({"2.bias": params["2.bias"] + 1}, data[0])  # a subset of the parameters
    assert torch.allclose(doubled, expected)  # logits shifted by a constant
    with pytest.raises(ValueError, match=r"\(x, y\) batches need a criterion"):
        functional_loss(model)(params, data[0])
    with pytest.raises(ValueError, match=r"must be \(x, y\) or a mapping; got Tensor"):
        loss(params, data[0][0])
    with pytest.raises(ValueError, match="returned no .loss for the batch keys"):
        functional_loss(nn.Linear(5, 3).double())(  # a module that returns a tensor
            {}, {"input": data[0][0]})


def test_the_pieces_of_the_search() -> None:
    assert sorted(checkpoints(20)) == [5, 9, 12, 14, 16, 18, 19, 20] and max(checkpoints(7)) == 7
    vectors = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    products = vectors @ vectors.T
    assert into_ball(torch.tensor([1.0, 0.0]).double(), products, 10.0).tolist() == [1.0, 0.0]
    inside = into_ball(torch.tensor([1.0, -2.0]).double(), products, 1.0) @ vectors
    assert torch.allclose(inside, torch.tensor([3.0, 2.0]).double() / 13**0.5)
    assert into_ball(torch.zeros(2).double(), products, 1.0).tolist() == [0.0, 0.0]
