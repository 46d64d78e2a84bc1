"""ParameterManifold: against a dense metric with the vertical space spanned by the action."""

from __future__ import annotations

import pytest
import torch
from networks import MODELS, params_of
from torch import Tensor

from symgeo import ParameterManifold, Symmetry, SymmetryError, find_symmetry
from symgeo.functional import Params
from symgeo.groups import GeneralLinear, Permutation, Rotary

PAIRS = (GeneralLinear, Rotary)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(params: Params, seed: int) -> Params:
    g = generator(seed)
    return {name: torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in params.items()}


def attention(seed: int = 0) -> tuple[Params, Symmetry]:
    """Grouped queries with rotary positions, fused key-value with biases, a LoRA pair and free parameters."""
    g = generator(seed)
    shapes = {"q": (8, 5), "kv": (8, 5), "kv_bias": (8,), "o": (5, 8), "gain": (5,), "B": (7, 2), "A": (2, 3)}
    params = {name: torch.randn(*shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    # 2 key-value heads of size 2 (one rotary plane), 2 query heads for each
    symmetry = Symmetry(
        {"q": "(K G e*) _", "kv": "(K e + K f) _", "kv_bias": "(K e + K f)", "o": "_ (K G f*)",
         "B": "_ r", "A": "r* _"},
        {"K": Permutation(), "e": Rotary(per="K"), "f": GeneralLinear(per="K"), "r": GeneralLinear()},
        sizes={"K": 2, "G": 2},
    )
    return params, symmetry


def pair_element(symmetry: Symmetry, params: Params, seed: int = 0):
    """A random element of the groups that the manifold quotients."""
    action = symmetry.bind(params)
    names = [name for name, group in action.groups.items() if isinstance(group, PAIRS)]
    return action, action.random(generator(seed), only=names)


def flat(params: Params) -> Tensor:
    return torch.cat([p.reshape(-1) for p in params.values()])


def dense_metric(manifold: ParameterManifold, params: Params) -> Tensor:
    """The Gram matrix of the coordinate vectors: row i is the derivative of <u, e_i>."""
    sizes = [p.numel() for p in params.values()]

    def vector(row: Tensor) -> Params:
        return {name: piece.reshape(p.shape) for (name, p), piece in zip(params.items(), row.split(sizes))}

    rows = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        probe = torch.zeros(sum(sizes), dtype=torch.float64, requires_grad=True)
        rows.append(torch.autograd.grad(manifold.inner(params, vector(probe), vector(unit)), probe)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("metric", ["inv", "mix"])
def test_horizontal_projection_against_a_dense_one(metric: str) -> None:
    params, symmetry = attention()
    manifold = ParameterManifold(params, symmetry, metric)
    metric_matrix = dense_metric(manifold, params)
    action = symmetry.bind(params)
    vertical = torch.stack([flat(action.vertical(action.random_algebra(generator(s)), params)) for s in range(40)])
    basis = torch.linalg.svd(vertical)
    rank = int((basis.S > 1e-9 * basis.S[0]).sum())
    assert rank == symmetry.dimension(params) == 2 * 2 + 2 * 4 + 4
    v = basis.Vh[:rank].T
    u = noise(params, 3)
    coefficients = torch.linalg.solve(v.T @ metric_matrix @ v, v.T @ metric_matrix @ flat(u))
    expected = flat(u) - v @ coefficients
    assert torch.allclose(flat(manifold.horizontal(params, u)), expected, atol=1e-10)
    assert (expected - flat(u)).norm() > 0.1


@pytest.mark.parametrize("metric", ["inv", "mix"])
def test_gradient_is_dual_to_horizontal_vectors(metric: str) -> None:
    params, symmetry = attention()
    manifold = ParameterManifold(params, symmetry, metric)
    covector, u = noise(params, 1), manifold.random_tangent(params, generator(2))
    gradient = manifold.rgrad(params, covector)
    assert torch.allclose(manifold.inner(params, gradient, u), flat(covector) @ flat(u), rtol=1e-10)
    assert manifold.norm(params, u) > 1


@pytest.mark.parametrize("metric", ["inv", "mix"])
@pytest.mark.parametrize("rest", ["adaptive", "euclidean"])
def test_invariance_along_the_orbit(metric: str, rest: str) -> None:
    params, symmetry = attention()
    manifold = ParameterManifold(params, symmetry, metric, rest)
    action, element = pair_element(symmetry, params)
    moved = action.act(element, params)
    assert (flat(moved) - flat(params)).norm() > 0.5
    u = manifold.horizontal(params, noise(params, 1))
    v = action.act(element, u)  # the action is linear
    assert torch.allclose(manifold.norm(moved, v), manifold.norm(params, u), rtol=1e-10)
    assert torch.allclose(flat(manifold.horizontal(moved, v)), flat(v), rtol=1e-8, atol=1e-9)
    step = {name: 0.1 * x for name, x in u.items()}
    there = manifold.geodesic(moved, action.act(element, step))(1.0)
    carried = action.act(element, manifold.geodesic(params, step)(1.0))
    assert torch.allclose(flat(there), flat(carried), rtol=1e-7, atol=1e-9)
    euclidean = ParameterManifold(params, None, rest=rest)
    assert abs(float(euclidean.norm(moved, v) / euclidean.norm(params, u)) - 1) > 1e-2


def test_permutations_and_scalings_are_isometries_too() -> None:
    params, symmetry = attention()
    manifold, action = ParameterManifold(params, symmetry), symmetry.bind(params)
    element = action.element({"K": torch.tensor([1, 0])})
    u = manifold.random_tangent(params, generator())
    moved = action.act(element, params)
    assert torch.allclose(manifold.norm(moved, action.act(element, u)), manifold.norm(params, u), rtol=1e-12)
    scale = lambda p: p | {"gain": p["gain"] * torch.arange(1.0, 6.0, dtype=torch.float64)}  # noqa: E731
    assert torch.allclose(manifold.norm(scale(params), scale(u)), manifold.norm(params, u), rtol=1e-12)
    plain = ParameterManifold(params, symmetry, rest="euclidean")
    assert abs(float(plain.norm(scale(params), scale(u)) / plain.norm(params, u)) - 1) > 1e-3


@pytest.mark.parametrize("method", ["exact", "taylor2", "linear"])
@pytest.mark.parametrize("metric", ["inv", "mix"])
def test_chart_and_manifold_agree(metric: str, method: str) -> None:
    """Coordinates are orthonormal, and points reached in them are the manifold's, in another gauge."""
    params, symmetry = attention()
    manifold = ParameterManifold(params, symmetry, metric)
    chart = manifold.chart(params)
    z = 0.3 * chart.random(generator())
    u = chart.tangent(z)
    assert torch.allclose(chart.coordinates(u), z, atol=1e-11)
    assert torch.allclose(manifold.norm(params, u), z.norm(), rtol=1e-11)
    assert torch.allclose(flat(manifold.horizontal(params, u)), flat(u), atol=1e-10)
    reached, balanced = manifold.geodesic(params, u, method)(1.0), chart.point(z, method)
    invariant = lambda p: torch.cat([(p["B"] @ p["A"]).flatten(), p["gain"], (p["o"] @ _values(p)).flatten()])  # noqa: E731
    assert torch.allclose(invariant(reached), invariant(balanced), atol=1e-9)
    assert (flat(reached) - flat(balanced)).norm() > 1e-2
    again = manifold.chart(balanced_start := chart.point(chart.origin()))
    assert torch.allclose(again.random(generator()), chart.random(generator()), atol=1e-8)  # the same in any gauge
    assert balanced_start.keys() == params.keys()


def _values(p: Params) -> Tensor:
    """Value rows, once for each of the two query heads of a key-value head."""
    return p["kv"][4:].unflatten(0, (2, 1, 2)).expand(2, 2, 2, 5).reshape(8, 5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "multihead", "tiny_vit"])
def test_pack_is_inverted_by_unpack(name: str) -> None:
    model = MODELS[name]()
    params = params_of(model)
    manifold = ParameterManifold(params, find_symmetry(model))
    packed = manifold.pack(params)
    back = manifold.unpack(packed, {name: p + 1 for name, p in params.items()})
    assert list(back) == list(params)
    assert all(torch.equal(back[key], params[key]) for key in params)
    numbers = sum(t.numel() * (2 if t.is_complex() else 1) for t in packed.values())
    assert numbers == sum(p.numel() for p in params.values())
    assert len(packed) <= 3  # one batch for each shape


def test_zeros_are_left_out() -> None:
    params = {"w": torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)}
    manifold = ParameterManifold(params)
    ones = {"w": torch.ones(3, dtype=torch.float64)}
    assert manifold.chart(params).zeros == 1
    assert manifold.horizontal(params, ones)["w"].tolist() == [1.0, 0.0, 1.0]
    assert manifold.geodesic(params, ones)(1.0)["w"][1] == 0
    assert torch.allclose(manifold.inner(params, ones, ones), torch.tensor(1.25, dtype=torch.float64))


def test_frozen_parameters_are_constants() -> None:
    params, symmetry = attention()
    frozen = Symmetry(symmetry.tensors, symmetry.groups, symmetry.sizes, frozen={"A", "gain"})
    manifold = ParameterManifold(params, frozen)
    assert manifold.layout.pairs == 4 and ParameterManifold(params, symmetry).layout.pairs == 5  # B A is no pair now
    u = manifold.horizontal(params, noise(params, 1))
    assert not u["A"].any() and not u["gain"].any() and u["B"].any()
    reached = manifold.geodesic(params, {name: 0.1 * x for name, x in u.items()})(1.0)
    assert torch.equal(reached["A"], params["A"]) and not torch.equal(reached["B"], params["B"])
    chart = manifold.chart(params)
    point, tangent = chart.point(0.1 * chart.random(generator())), chart.tangent(chart.random(generator()))
    assert list(point) == list(params) == list(tangent)
    assert torch.equal(point["gain"], params["gain"]) and not tangent["gain"].any()
    assert torch.allclose(manifold.norm(params, params), manifold.norm(params, params | {"A": 5 * params["A"]}))


def test_float32_and_mixed_dtypes() -> None:
    params, symmetry = attention()
    single = {name: p.float() for name, p in params.items()}
    a, b = ParameterManifold(params, symmetry), ParameterManifold(single, symmetry)
    u = noise(params, 1)
    h = b.horizontal(single, {name: x.float() for name, x in u.items()})
    assert all(x.dtype == torch.float32 for x in h.values())
    assert torch.allclose(flat(h).double(), flat(a.horizontal(params, u)), atol=1e-4)
    mixed = params | {"gain": params["gain"].float()}
    chart = ParameterManifold(mixed, symmetry).chart(mixed)
    reached = chart.point(0.1 * chart.random(generator()))
    assert {name: p.dtype for name, p in reached.items()} == {name: p.dtype for name, p in mixed.items()}


def test_half_precision_parameters_keep_their_rank_and_dtype() -> None:
    params, symmetry = attention()
    half = {name: p.to(torch.bfloat16) for name, p in params.items()}
    chart = ParameterManifold(half, symmetry).chart(half)
    assert chart.relaxed == 0 and chart.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in chart.point(0.1 * chart.random(generator())).values())


def test_errors_name_the_parameter() -> None:
    params, symmetry = attention()
    manifold = ParameterManifold(params, symmetry)
    with pytest.raises(ValueError, match=r"u: parameter 'A' of shape \(2, 3\) is missing"):
        manifold.norm(params, {name: x for name, x in params.items() if name != "A"})
    with pytest.raises(ValueError, match=r"'gain' must have shape \(5,\); got \(4,\)"):
        manifold.horizontal(params, params | {"gain": torch.ones(4)})
    with pytest.raises(ValueError, match="'extra' is not a parameter of this manifold"):
        manifold.rgrad(params, params | {"extra": torch.ones(1)})
    with pytest.raises(ValueError, match="metric must be one of inv, mix; got 'kron'"):
        ParameterManifold(params, symmetry, metric="kron")
    with pytest.raises(ValueError, match="rest must be one of adaptive, euclidean; got 'flat'"):
        ParameterManifold(params, symmetry, rest="flat")
    with pytest.raises(ValueError, match="'B' has entries that are not finite"):
        ParameterManifold(params | {"B": params["B"] / 0}, symmetry)
    with pytest.raises(ValueError, match="'B' must be a floating-point tensor; got torch.int64"):
        ParameterManifold({"B": torch.ones(2, 2, dtype=torch.int64)})
    with pytest.raises(ValueError, match="the dict is empty"):
        ParameterManifold({})
    with pytest.raises(SymmetryError, match="'r' acts on 'B', but nothing carries 'r\\*'"):
        ParameterManifold({"B": params["B"]}, Symmetry({"B": "_ r"}, {"r": GeneralLinear()}))
    chain = Symmetry({"w1": "e _", "w2": "f e*", "w3": "_ f*"}, {"e": GeneralLinear(), "f": GeneralLinear()})
    weights = {name: torch.ones(2, 2, dtype=torch.float64) for name in ("w1", "w2", "w3")}
    with pytest.raises(SymmetryError, match="'w2' carries both 'e' and 'f'"):
        ParameterManifold(weights, chain)
    with pytest.raises(SymmetryError, match="two axes of 'w1'"):
        ParameterManifold({"w1": weights["w1"]}, Symmetry({"w1": "e e*"}, {"e": GeneralLinear()}))
    with pytest.raises(SymmetryError, match="'A'"):
        ParameterManifold({"B": params["B"]}, Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()}))
