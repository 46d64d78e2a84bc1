"""The covariant Hessian on the quotient: a dense oracle, invariance with its control, and the vertical identities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hessian_cases import (
    GroupedBlock,
    attention,
    christoffel_of,
    dense_gradient,
    dense_hessian,
    error,
    flat,
    generator,
    normal,
    orbit,
    seeded,
    transformer_block,
    unflat,
)
from networks import bert, language_loss, llama, params_of
from torch import Tensor, nn

from manifolds.frame import frame
from symgeo import ParameterManifold, Symmetry, SymmetryError, find_symmetry, functional_loss
from symgeo.functional import Loss, Params
from symgeo.groups import GeneralLinear, Rotary
from symgeo.hessian import euclidean_hessian, geodesic_jet, ggn, invariant_hessian, model_loss, riemannian_hessian
from symgeo.hessian.horizontal import HorizontalBasis

LORA = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})


def lora(seed: int = 0) -> tuple[Params, Tensor]:
    params = {"B": normal(5, 2, seed=seed), "A": normal(2, 3, seed=seed + 1), "gain": normal(3, seed=seed + 2) + 3}
    return params, normal(5, 3, seed=seed + 3)


def lora_loss(params: Params, target: Tensor) -> Tensor:
    return ((params["B"] @ params["A"] * params["gain"]).tanh() - target).square().mean()


def dense_metric(params: Params, metric: str) -> Callable[[Tensor], Tensor]:
    """The metric of the pair and of the gain by its definition, as a matrix in flat order."""
    def matrix(x: Tensor) -> Tensor:
        p = unflat(x, params)
        m_b, m_a = p["B"].T @ p["B"], p["A"] @ p["A"].T
        inverses = (torch.linalg.inv(m).contiguous() for m in (m_b, m_a))
        w_b, w_a = inverses if metric == "inv" else (m_a, m_b)
        eye = lambda n: torch.eye(n, dtype=x.dtype)  # noqa: E731
        return torch.block_diag(torch.kron(eye(5), w_b), torch.kron(w_a, eye(3)), p["gain"].pow(-2).diag())

    return matrix


def horizontal_basis(g: Tensor, params: Params) -> Tensor:
    """Columns that are G-orthonormal, and G-orthogonal to every vertical vector (B L, -L A)."""
    units = torch.eye(4, dtype=torch.float64).reshape(4, 2, 2)
    vertical = torch.stack([flat({"B": params["B"] @ x, "A": -x @ params["A"], "gain": 0 * params["gain"]})
                            for x in units], dim=1)
    root = torch.linalg.cholesky(g).T  # <u, v> = (root u) . (root v)
    complete = torch.linalg.qr(root @ vertical, mode="complete").Q[:, vertical.shape[1]:]
    return torch.linalg.solve(root, complete)


@pytest.mark.parametrize("metric", ["inv", "mix"])
def test_it_is_the_textbook_formula(metric: str) -> None:
    """Eigenvalues of B^T (d2L - Gamma^k d_k L) B with a dense metric, its Christoffel symbols and a basis by QR."""
    params, target = lora()
    operator = riemannian_hessian(lora_loss, params, [target], ParameterManifold(params, LORA, metric))
    g = dense_metric(params, metric)
    bend = torch.einsum("k,kij->ij", dense_gradient(lora_loss, params, [target]), christoffel_of(g, flat(params)))
    basis = horizontal_basis(g(flat(params)), params)
    expected = basis.T @ (dense_hessian(lora_loss, params, [target]) - bend) @ basis
    assert operator.shape == tuple(expected.shape) == (10 + 6 + 3 - 4,) * 2
    assert error(operator.eigvalsh(), torch.linalg.eigvalsh(expected)) <= 1e-10
    assert operator.trace().value == pytest.approx(float(expected.trace()), rel=1e-10)
    u = unflat(basis @ normal(15), params)
    image = basis @ expected @ basis.T @ g(flat(params)) @ flat(u)  # the same map of tangent vectors
    assert error(flat(operator @ u), image) <= 1e-10
    plain = basis.T @ dense_hessian(lora_loss, params, [target]) @ basis  # without the connection
    assert error(torch.linalg.eigvalsh(plain), torch.linalg.eigvalsh(expected)) > 1e-2


CASES = ["grouped", "lora", "euclidean", "relaxed", "deficient", "mixed ranks"]


def by_definition(name: str, metric: str) -> tuple[Loss, Params, list[Any], ParameterManifold]:
    """Real and rotary pairs; a LoRA pair with other rests and metrics; pairs without full rank, alone or not."""
    if name in ("grouped", "mixed ranks"):
        model = seeded(lambda: GroupedBlock(3, 4, 2, 3), 1, 0.5)
        params, data = params_of(model), [(normal(2, 5, 3), normal(2, 5, 3, seed=1))]
        if name == "mixed ranks":  # the values of one of the two heads
            params["v"][:2] = 0
        loss = functional_loss(model, nn.functional.mse_loss)
        return loss, params, data, ParameterManifold(params, GroupedBlock.SYMMETRY, metric)
    params, target = lora()
    if name == "deficient":
        params = params | {"B": torch.zeros_like(params["B"]), "gain": params["gain"] * torch.tensor([1.0, 0.0, 1.0])}
    rest, eps = "euclidean" if name == "euclidean" else "adaptive", 0.1 if name == "relaxed" else 0.0
    data = [target, target + 1][:1 if eps else 2]  # the relaxed connection is slow
    return lora_loss, params, data, ParameterManifold(params, LORA, metric, rest, eps)


@pytest.mark.parametrize("metric", ["inv", "mix"])
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_composition_with_a_second_order_geodesic(name: str, metric: str) -> None:
    """The plain Hessian of L along z -> exp(z) to second order, at z = 0; along straight lines without connection."""
    loss, params, data, manifold = by_definition(name, metric)
    chart = manifold.chart(params)
    quotient = riemannian_hessian(loss, params, data, manifold)
    basis = HorizontalBasis(chart)
    columns = chart.join(*basis.expand(torch.eye(basis.size, dtype=torch.float64))).T
    assert error(columns.T @ columns @ columns.T, columns.T) <= 1e-12  # an isometry, off the coordinates it lacks
    found = {"taylor2": [(quotient, columns)], "linear": []}
    kept = torch.cat([chart.rest != 0 if chart.adaptive else torch.ones_like(chart.rest, dtype=torch.bool),
                      torch.ones(chart.size - chart.sizes[0], dtype=torch.bool)])
    for method, connection in (("taylor2", True), ("linear", False)):
        whole = invariant_hessian(loss, params, data, manifold, connection)
        found[method].append((whole, torch.eye(chart.size, dtype=torch.float64)[:, kept]))
    for method, operators in found.items():
        along = lambda z, m=method: sum(loss(chart.point(z, m), batch) for batch in data) / len(data)  # noqa: E731
        dense = torch.func.hessian(along)(chart.origin())
        for operator, e in operators:
            expected = e.T @ dense @ e
            assert error(operator.dense(), expected) <= 1e-12
            assert error(operator @ normal(len(expected)), expected @ normal(len(expected))) <= 1e-12  # one column


@pytest.mark.parametrize("metric", ["inv", "mix"])
@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_the_connection_of_a_pair_is_the_polarisation_of_its_bend(kind: torch.dtype, metric: str) -> None:
    """<slope, Gamma(z, y)> = <slope, (Gamma(z + y, z + y) - Gamma(z - y, z - y)) / 4>; with leading dimensions."""
    for eps in (0.0, 0.1):
        x, slope, z, y = (torch.randn(*size, 2, 11, 3, generator=generator(i), dtype=kind)
                          for i, size in enumerate([(), (), (5,), (5,)]))
        f = frame(x, 4, metric, eps)
        inner = lambda u, v: (u.conj() * v).real.sum((-3, -2, -1))  # noqa: E731
        expected = inner(slope, (f.bend(z + y) - f.bend(z - y)) * f.root / 4)
        assert error(inner(f.connection(slope, z), y), expected) <= 1e-12


@pytest.mark.parametrize("metric", ["inv", "mix"])
def test_the_whole_tangent_space(metric: str) -> None:
    """invariant_hessian with the manifold and with its dense metric agree, with and without connection."""
    params, target = lora()
    manifold, g = ParameterManifold(params, LORA, metric), dense_metric(params, metric)
    for connection in (True, False):
        a = invariant_hessian(lora_loss, params, [target], manifold, connection)
        b = invariant_hessian(lora_loss, params, [target], lambda p: g(flat(p)), connection)
        assert a.shape == b.shape == (19, 19)
        assert error(a.eigvalsh(), b.eigvalsh()) <= 1e-10
        u = unflat(normal(19), params)
        assert error(flat(a @ u), flat(b @ u)) <= 1e-10


@pytest.mark.parametrize("metric", ["inv", "mix"])
@pytest.mark.parametrize("name", ["bert", "grouped"])
def test_invariant_along_random_orbits(name: str, metric: str) -> None:
    """All eigenvalues and the trace, at a point that is not critical; Euclidean ones move by more than a tenth."""
    model, symmetry, data = transformer_block(name)
    loss, params = functional_loss(model, nn.functional.mse_loss), params_of(model)
    moved = orbit(symmetry, params, seed=1)
    assert float(loss(moved, data[0])) == pytest.approx(float(loss(params, data[0])), rel=1e-9)
    assert error(flat(moved), flat(params)) > 0.1
    manifold = ParameterManifold(params, symmetry, metric)
    before, after = (riemannian_hessian(loss, p, data, manifold) for p in (params, moved))
    lost = sum(action_size(manifold))
    assert before.shape == (flat(params).numel() - lost,) * 2
    spectra = [operator.eigvalsh() for operator in (before, after)]
    assert error(spectra[1], spectra[0]) <= 1e-8
    assert after.trace().value == pytest.approx(before.trace().value, rel=1e-8)
    assert error(after.eigvalsh(1), spectra[0][-1:]) <= 1e-8
    plain = [euclidean_hessian(loss, p, data) for p in (params, moved)]
    tops, traces = [float(op.eigvalsh(1)) for op in plain], [op.trace().value for op in plain]
    assert abs(tops[1] / tops[0] - 1) > 0.1 and abs(traces[1] / traces[0] - 1) > 0.1


def action_size(manifold: ParameterManifold) -> list[int]:
    """Real dimension of each batch of groups: h^2 for each pair, twice that for complex ones."""
    sizes = []
    for instances in manifold.layout.buckets.values():
        for instance in instances:
            complex_planes = instance.signature[3] != ""
            h = instance.signature[2]
            sizes.append(instance.batch * h * h * (2 if complex_planes else 1))
    return sizes


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_invariant_on_transformers_models(name: str) -> None:
    """Top eigenvalue and estimated trace; 1e-5 because norms, softmax or loss run in float32 inside.

    The control is the plain curvature along four fixed directions."""
    model = bert(1) if name == "bert" else llama()
    loss, data = language_loss(model, labels=3 if name == "bert" else None)
    params, symmetry = params_of(model), find_symmetry(model)
    moved, manifold = orbit(symmetry, params), ParameterManifold(params, symmetry)
    before, after = (riemannian_hessian(loss, p, data[:1], manifold) for p in (params, moved))
    assert error(after.eigvalsh(1, tol=1e-8), before.eigvalsh(1, tol=1e-8)) <= 1e-5
    assert after.trace(samples=8).value == pytest.approx(before.trace(samples=8).value, rel=1e-5)
    directions = [unflat(normal(flat(params).numel(), seed=seed), params) for seed in range(4)]
    plain = [torch.stack([flat(v) @ flat(euclidean_hessian(loss, p, data[:1]) @ v) for v in directions])
             for p in (params, moved)]
    assert (plain[1] / plain[0] - 1).abs().max() > 0.1


@pytest.mark.parametrize("metric", ["inv", "mix"])
def test_zero_directions_at_a_minimum(metric: str) -> None:
    """At a minimum exactly h^2 eigenvalues of the whole Hessian vanish; the others are those of the quotient."""
    params, _ = lora()
    target = (params["B"] @ params["A"] * params["gain"]).tanh()  # attained
    params = {name: params[name] for name in ("B", "A")}
    gain = lora()[0]["gain"]
    loss = lambda p, batch: lora_loss(p | {"gain": gain}, batch)  # noqa: E731
    manifold = ParameterManifold(params, LORA, metric)
    whole, plain = (invariant_hessian(loss, params, [target], manifold, c).eigvalsh() for c in (True, False))
    quotient = riemannian_hessian(loss, params, [target], manifold).eigvalsh()
    assert int((whole.abs() < 1e-6).sum()) == 4 and quotient.numel() == 16 - 4
    assert int((quotient < 1e-6).sum()) == 0
    assert error(whole[whole > 1e-6], quotient) <= 1e-8 and error(plain[plain > 1e-6], quotient) <= 1e-8
    euclidean = euclidean_hessian(loss, params, [target]).eigvalsh()
    assert int((euclidean.abs() < 1e-6).sum()) == 4


@pytest.mark.parametrize("name", ["bert", "grouped"])
def test_zero_eigenvalues_of_blocks_at_a_minimum(name: str) -> None:
    """Where the targets are attained, the whole Hessian has ``h^2`` zero eigenvalues for each pair, and others only
    where the quotient has some too; its vertical vectors are among them, which away from the minimum they are not."""
    model, symmetry, _ = transformer_block(name)
    width = 6 if name == "bert" else 5
    inputs = normal(15, 5, width, seed=3)
    with torch.no_grad():
        attained = [(inputs, model(inputs))]
    loss, params = functional_loss(model, nn.functional.mse_loss), params_of(model)
    manifold = ParameterManifold(params, symmetry)
    hessian = euclidean_hessian(loss, params, attained).eigvalsh()
    quotient = riemannian_hessian(loss, params, attained, manifold).eigvalsh()
    spectra = [values.abs() / values.max() for values in (hessian, quotient)]
    zeros = [int((values < 1e-14).sum()) for values in spectra]
    assert zeros[0] - zeros[1] == sum(action_size(manifold)) > 0
    assert all(values[values >= 1e-14].min() > 1e-13 for values in spectra)  # a gap on both sides
    xi, _ = vertical(symmetry, params)
    for data, flat_along in ((attained, True), ([(inputs, attained[0][1] + 1)], False)):
        image = flat(euclidean_hessian(loss, params, data) @ xi)
        assert bool(image.norm() <= 1e-9 * hessian.max() * flat(xi).norm()) == flat_along


def vertical(symmetry: Symmetry, params: Params) -> tuple[Params, Params]:
    """The velocity and the acceleration of ``exp(t X) w`` at 0 for a random X of all the GL and rotary groups."""
    action = symmetry.bind(params)
    kept = [name for name, group in action.groups.items() if isinstance(group, (GeneralLinear, Rotary))]
    drawn = action.random_algebra(generator(5))
    generators = action.element({name: drawn[name] if name in kept else torch.zeros_like(drawn[name])
                                 for name in drawn})
    velocity = action.vertical(generators, params)
    return velocity, action.vertical(generators, velocity)


@pytest.mark.parametrize("name", ["bert", "grouped"])
def test_the_vertical_identity_on_blocks(name: str) -> None:
    """H[xi, xi] + dL(xi') = 0 for all pairs of queries and keys, values and outputs, with their biases, at once."""
    model, symmetry, data = transformer_block(name)
    loss, params = functional_loss(model, nn.functional.mse_loss), params_of(model)
    xi, turn = vertical(symmetry, params)
    slope, operator = dense_gradient(loss, params, data), euclidean_hessian(loss, params, data)
    along, bend = float(flat(xi) @ flat(operator @ xi)), float(slope @ flat(turn))
    assert abs(float(slope @ flat(xi))) <= 1e-9 * float(slope.norm() * flat(xi).norm())
    assert abs(along) > 1e-3 and abs(along + bend) <= 1e-9 * (abs(along) + float(slope.norm() * flat(turn).norm()))


def test_the_vertical_identity_on_attention() -> None:
    """(Q, K) -> (Q A, K A^-T): dL(xi) = 0 and H[xi, xi] + dL(xi') = 0 at any point, though H[xi, xi] is not 0."""
    model, data = attention()
    loss, params = functional_loss(model, nn.functional.mse_loss), params_of(model)
    operator, x = euclidean_hessian(loss, params, data), normal(3, 3, seed=9)
    zero = {name: torch.zeros_like(p) for name, p in params.items()}
    xi = zero | {"q": params["q"] @ x, "k": -params["k"] @ x.T}
    turn = zero | {"q": params["q"] @ x @ x, "k": params["k"] @ x.T @ x.T}
    slope = dense_gradient(loss, params, data)
    along = float(flat(xi) @ flat(operator @ xi))
    assert abs(along) > 1e-3
    assert abs(float(slope @ flat(xi))) <= 1e-9 * float(slope.norm() * flat(xi).norm())
    assert abs(along + float(slope @ flat(turn))) <= 1e-9 * abs(along)
    split = model_loss(model, "mse")
    value = {"v": params["v"]}
    assert error(euclidean_hessian(split, value, data).dense(), ggn(split, value, data).dense()) <= 1e-9
    query = {"q": params["q"]}
    assert error(euclidean_hessian(split, query, data).dense(), ggn(split, query, data).dense()) > 1e-2


@pytest.mark.parametrize("metric", ["inv", "mix"])
def test_the_quadratic_form_is_the_second_derivative_along_geodesics(metric: str) -> None:
    """By the 2-jet and by finite differences of the loss on the exact geodesic; also for the top eigenvector."""
    model, symmetry, data = transformer_block("grouped")
    loss, params = functional_loss(model, nn.functional.mse_loss), params_of(model)
    manifold = ParameterManifold(params, symmetry, metric)
    operator = riemannian_hessian(loss, params, data, manifold)
    top = operator.eigh(1)
    assert float(manifold.norm(params, top.vectors[0])) == pytest.approx(1, rel=1e-9)
    assert error(flat(operator @ top.vectors[0]), top.values[0] * flat(top.vectors[0])) <= 1e-6
    random = manifold.random_tangent(params, generator())
    for u, expected in ((top.vectors[0], float(top.values[0])),
                        (random, float(manifold.inner(params, random, operator @ random)))):
        jets = [geodesic_jet(loss, params, data, manifold, u, method) for method in ("exact", "taylor2", "linear")]
        assert jets[0].curvature == pytest.approx(expected, rel=1e-9)
        assert jets[1].curvature == pytest.approx(expected, rel=1e-9)
        assert jets[2].curvature != pytest.approx(expected, rel=1e-3)
        assert jets[0].slope == pytest.approx(float(dense_gradient(loss, params, data) @ flat(u)), rel=1e-8)
        step = 1e-2 / float(manifold.norm(params, u))
        curve = manifold.geodesic(params, u)
        low, mid, high = (float(loss(curve(t), data[0])) for t in (-step, 0.0, step))
        assert (low + high - 2 * mid) / step**2 == pytest.approx(expected, rel=1e-2)


def test_spaces_frozen_parameters_and_deficient_pairs() -> None:
    params, target = lora()
    frozen = Symmetry(LORA.tensors, LORA.groups, frozen={"gain"})
    operator = riemannian_hessian(lora_loss, params, [target], ParameterManifold(params, frozen))
    assert operator.shape == (12, 12)
    u = unflat(normal(19), params)
    assert not (operator @ u)["gain"].any() and (operator @ u)["B"].any()
    manifold = ParameterManifold(params, LORA)
    a = riemannian_hessian(lora_loss, params, [target], manifold)
    b = riemannian_hessian(lora_loss, params, [target + 1], manifold)
    both = riemannian_hessian(lora_loss, params, [target, target + 1], manifold)
    assert error(((a + b) / 2).dense(), both.dense()) <= 1e-12
    with pytest.raises(ValueError, match="different spaces"):
        _ = a + riemannian_hessian(lora_loss, params, [target], ParameterManifold(params, LORA, "mix"))
    with pytest.raises(ValueError, match="different spaces"):
        _ = a + euclidean_hessian(lora_loss, params, [target])
    start = params | {"B": torch.zeros_like(params["B"]), "gain": params["gain"] * torch.tensor([1.0, 0.0, 1.0])}
    low = riemannian_hessian(lora_loss, start, [target], ParameterManifold(start, LORA))
    assert low.shape == (18, 18)  # vertical directions stay as zeros, the zero gain is left out
    assert torch.isfinite(low.dense()).all()


def test_float32_agrees() -> None:
    params, target = lora()
    single = {name: p.float() for name, p in params.items()}
    exact, low = (riemannian_hessian(lora_loss, p, [t], ParameterManifold(p, LORA))
                  for p, t in ((params, target), (single, target.float())))
    assert low.dtype == torch.float32
    assert error(low.eigvalsh(3).double(), exact.eigvalsh(3)) <= 1e-4


def test_bad_input_is_one_clear_error() -> None:
    params, target = lora()
    manifold = ParameterManifold(params, LORA)
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("manifold must be a symgeo.ParameterManifold; got str",
         lambda: riemannian_hessian(lora_loss, params, [target], "inv")),
        ("parameter 'A' of shape", lambda: riemannian_hessian(lora_loss, {"B": params["B"]}, [target], manifold)),
        ("needed at least one batch", lambda: riemannian_hessian(lora_loss, params, [], manifold)),
        ("geodesic must be one of", lambda: geodesic_jet(lora_loss, params, [target], manifold, params, "ode")),
        ("manifold must be", lambda: geodesic_jet(lora_loss, params, [target], None, params)),
    ]
    for message, build in cases:
        with pytest.raises(ValueError, match=message) as caught:
            build()
        assert "\n" not in str(caught.value)
    with pytest.raises(SymmetryError, match="not invariant under the declared symmetry"):
        riemannian_hessian(lambda p, b: p["B"].square().sum(), params, [target], manifold)
