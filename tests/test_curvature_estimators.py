"""The three estimators: dense formulas, exact recovery on invariant quadratics, step laws, covariance."""

from __future__ import annotations

import math

import pytest
import torch
from curvature_oracles import Params, dense_power, error, flat, normal
from torch import Tensor

from symgeo import Symmetry
from symgeo.curvature import Decomposition, InvariantOperator, estimate, orbit_average, orbit_mean, precondition
from symgeo.errors import SymmetryError
from symgeo.groups import Cyclic, Orthogonal, Permutation, SignFlip
from symgeo.symmetry import Element

P, S, O = Permutation, SignFlip, Orthogonal  # noqa: E741
RNN = Symmetry({"b": "_ h", "w": "h h", "c": "h _", "bias": "h"}, {"h": P()})
RNN_SHAPES = {"b": (2, 13), "w": (13, 13), "c": (13, 3), "bias": (13,), "out": (3,)}
HEADS = Symmetry({"q": "_ (H e)", "v": "(H e) _"}, {"H": P(), "e": O(per="H")}, {"H": 5})
HEADS_SHAPES = {"q": (3, 15), "v": (15, 2)}
WIDE = Symmetry({"w": "_ h"}, {"h": P()})
WIDE_SHAPES = {"w": (7, 5)}
MIXED = Symmetry({"c": "c _", "s": "s _", "b": "(h s2) _", "o": "o o"},
                 {"c": Cyclic(), "s": S(), "h": P(), "s2": S(per="h"), "o": O()})
MIXED_SHAPES = {"c": (7, 2), "s": (5, 1), "b": (11, 3), "o": (3, 3)}


def centred(symmetry: Symmetry, u: Params) -> Params:
    mean = orbit_mean(symmetry, u)
    return {name: x - mean[name] for name, x in u.items()}


def quadratic(symmetry: Symmetry, shapes: dict[str, tuple[int, ...]], definite: bool) -> InvariantOperator:
    """An invariant Hessian, from averages of random vectors."""
    terms = [orbit_average(symmetry, normal(shapes, 100 + i)) for i in range(40)]
    total = sum(terms[1:], start=terms[0])
    if definite:
        return total
    other = [orbit_average(symmetry, normal(shapes, 200 + i)) for i in range(40)]
    return total - sum(other[1:], start=other[0])


def nontrivial(decomposition: Decomposition, u: Params) -> Params:
    coordinates = decomposition.encode(u)
    if decomposition.trivial is not None:
        coordinates[0] = torch.zeros_like(coordinates[0])
    return decomposition.restore(decomposition.decode(coordinates), u)


def dense_root(a: Tensor) -> Tensor:
    """Columns ``R`` with ``R R^T = a``, for the eigenvalues that are not rounding error."""
    values, vectors = torch.linalg.eigh(a)
    kept = values > 1e-12 * values.max()
    return vectors[:, kept] * values[kept].sqrt()


@pytest.mark.parametrize(("symmetry", "shapes"), [(RNN, RNN_SHAPES), (HEADS, HEADS_SHAPES), (WIDE, WIDE_SHAPES)])
@pytest.mark.parametrize("eta", [0.0, 1e-4])
def test_riccati_equals_the_dense_formula(symmetry: Symmetry, shapes: dict[str, tuple[int, ...]], eta: float) -> None:
    w, g = normal(shapes, 0), normal(shapes, 1)
    s_w, s_g = (orbit_average(symmetry, centred(symmetry, u)).dense() for u in (w, g))
    root, back = dense_power(s_w, 0.5, eta), dense_power(s_w, -0.5, eta)
    inner = root @ s_g @ root
    expected = back @ dense_power(inner, 0.5, eta) @ back
    inverse = root @ dense_power(inner, -0.5, eta) @ root
    if not eta:  # the same H from roots alone: squaring the inner matrix would cost half of the digits
        left, right = dense_root(s_w), dense_root(s_g)
        u, s, _ = torch.linalg.svd(left.T @ right)
        lower = torch.linalg.pinv(left)
        expected = (lower.T @ u * s) @ u.T @ lower
    operator = estimate(w, g, symmetry, "riccati", "drop", eta)
    assert error(operator.dense(), expected) <= 1e-9
    step = precondition(w, g, symmetry, "riccati", eta, "drop")
    assert error(flat(step), inverse @ flat(g)) <= 1e-9
    if eta:
        assert error(flat(operator @ step), flat(g)) <= 1e-8


@pytest.mark.parametrize("estimator", ["gradient", "riccati", "secant"])
@pytest.mark.parametrize("trivial", ["drop", "uncentred", "diagonal", "dense"])
@pytest.mark.parametrize(("symmetry", "shapes"), [(RNN, RNN_SHAPES), (WIDE, WIDE_SHAPES), (MIXED, MIXED_SHAPES)])
def test_precondition_is_the_exact_inverse(
    estimator: str, trivial: str, symmetry: Symmetry, shapes: dict[str, tuple[int, ...]]
) -> None:
    w, g = normal(shapes, 0), normal(shapes, 1)
    for eta in (1e-4, 0.3):
        operator = estimate(w, g, symmetry, estimator, trivial, eta)
        step = precondition(w, g, symmetry, estimator, eta, trivial)
        assert error(flat(operator @ step), flat(g)) <= 1e-8
    operator = estimate(w, g, symmetry, estimator, trivial)
    step = precondition(w, g, symmetry, estimator, trivial=trivial)
    assert error(flat(operator @ (operator @ step)), flat(operator @ g)) <= 1e-7


def test_riccati_solves_its_equation_and_recovers_a_definite_hessian() -> None:
    for symmetry, shapes in ((RNN, RNN_SHAPES), (HEADS, HEADS_SHAPES)):
        h = quadratic(symmetry, shapes, True)
        w, c = normal(shapes, 0), orbit_mean(symmetry, normal(shapes, 5))
        g = h @ {name: w[name] - c[name] for name in w}
        s_w, s_g = (orbit_average(symmetry, centred(symmetry, u)) for u in (w, g))
        assert error((h @ s_w @ h).dense(), s_g.dense()) <= 1e-12
        for center in (None, c):
            found = estimate(w, g, symmetry, "riccati", "drop", center=center)
            assert error((found @ s_w @ found).dense(), s_g.dense()) <= 1e-8
            d = found.decomposition
            for x in (normal(shapes, 8), normal(shapes, 9)):
                x = nontrivial(d, x)
                assert error(flat(found @ x), flat(h @ x)) <= 1e-8


def test_riccati_with_few_coordinates_is_the_projection() -> None:
    """d = 4 < M = 7: only P H P is visible, P the projection on the range of S_w."""
    h, w = quadratic(WIDE, WIDE_SHAPES, True), normal(WIDE_SHAPES, 0)
    g = h @ w
    p = orbit_average(WIDE, centred(WIDE, w)).power(0).dense()
    found = estimate(w, g, WIDE, "riccati", "drop").dense()
    assert error(found, p @ h.dense() @ p) <= 1e-8
    assert error(found, h.dense()) > 1e-3


def test_secant_recovers_an_indefinite_hessian() -> None:
    for symmetry, shapes in ((RNN, RNN_SHAPES), (HEADS, HEADS_SHAPES)):
        h, w = quadratic(symmetry, shapes, False), normal(shapes, 0)
        values = [s for s, _ in h.eigvals()]
        assert min(values) < -0.1 and max(values) > 0.1
        g = h @ w
        found = estimate(w, g, symmetry, "secant", "drop")
        riccati = estimate(w, g, symmetry, "riccati", "drop")
        x = nontrivial(found.decomposition, normal(shapes, 8))
        assert error(flat(found @ x), flat(h @ x)) <= 1e-8
        assert error(flat(riccati @ x), flat(h @ x)) > 1e-3


def test_secant_is_the_least_squares_fit() -> None:
    """The gradient of E |dg - H dw|^2 over symmetric invariant H vanishes, by enumeration-free dense algebra."""
    for symmetry, shapes in ((RNN, RNN_SHAPES), (WIDE, WIDE_SHAPES), (MIXED, MIXED_SHAPES)):
        w, g = normal(shapes, 0), normal(shapes, 1)
        dw, dg = centred(symmetry, w), centred(symmetry, g)
        h = estimate(w, g, symmetry, "secant", "drop").dense()
        s_w, s_gw = orbit_average(symmetry, dw).dense(), orbit_average(symmetry, dg, dw).dense()
        assert error(h, h.mT) <= 1e-9
        assert error(h @ s_w + s_w @ h, s_gw + s_gw.mT) <= 1e-8


def test_estimators_on_complex_and_sign_kinds_recover_too() -> None:
    shapes = {"c": (7, 1), "s": (5, 1), "b": (11, 3)}
    symmetry = Symmetry({k: MIXED.tensors[k] for k in shapes}, {k: MIXED.groups[k] for k in ("c", "s", "h", "s2")})
    for estimator, definite in (("riccati", True), ("secant", False)):
        h, w = quadratic(symmetry, shapes, definite), normal(shapes, 0)
        found = estimate(w, h @ w, symmetry, estimator, "drop")
        x = nontrivial(found.decomposition, normal(shapes, 8))
        assert error(flat(found @ x), flat(h @ x)) <= 1e-8


def test_riccati_is_a_tensor_under_linear_reparametrisation() -> None:
    """w = B u with an invariant B: H_u = B^T H_w B; the gradient estimator is none."""
    b = quadratic(RNN, RNN_SHAPES, True) @ quadratic(RNN, RNN_SHAPES, False)
    b = b / float(b.frobenius())
    u = normal(RNN_SHAPES, 0)
    w, g = b @ u, normal(RNN_SHAPES, 1)
    for estimator, holds in (("riccati", True), ("gradient", False)):
        there = estimate(w, g, RNN, estimator, "drop")
        here = estimate(u, b.T @ g, RNN, estimator, "drop")
        assert (error(here.dense(), (b.T @ there @ b).dense()) <= 1e-6) == holds


def polar(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


G = normal({"w": (3, 7)}, 1)["w"]
ROWS = G.mean(1, keepdim=True)
LAWS: dict[str, tuple[Symmetry, str, Tensor]] = {
    "all free": (Symmetry({"w": "_ _"}, {}), "uncentred", G / G.norm()),
    "signed permutations": (Symmetry({"w": "_ (h s)"}, {"h": P(), "s": S(per="h")}), "drop", math.sqrt(7) * polar(G)),
    "orthogonal": (Symmetry({"w": "_ h"}, {"h": O()}), "diagonal", math.sqrt(7) * polar(G)),
    "signs of both axes": (Symmetry({"w": "a b"}, {"a": S(), "b": S()}), "diagonal", G.sign()),
    "signs of one axis": (Symmetry({"w": "_ b"}, {"b": S()}), "diagonal", G / G.norm(dim=0)),
    "both irreducible": (Symmetry({"w": "a (h s)"}, {"a": O(), "h": P(), "s": S(per="h")}), "diagonal",
                         math.sqrt(21) * G / G.norm()),
    "permutations": (Symmetry({"w": "_ h"}, {"h": P()}), "uncentred",
                     math.sqrt(6) * polar(G - ROWS) + ROWS / ROWS.norm() / math.sqrt(7)),
    "permutations, centred": (Symmetry({"w": "_ h"}, {"h": P()}), "drop", math.sqrt(6) * polar(G - ROWS)),
    "permutations, diagonal": (Symmetry({"w": "_ h"}, {"h": P()}), "diagonal",
                               math.sqrt(6) * polar(G - ROWS) + ROWS.sign() / math.sqrt(7)),
    "the short axis": (Symmetry({"w": "h _"}, {"h": O()}), "diagonal", math.sqrt(3) * polar(G)),
}


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_step_laws(law: str) -> None:
    symmetry, trivial, expected = LAWS[law]
    step = precondition({"w": torch.zeros_like(G)}, {"w": G}, symmetry, trivial=trivial)["w"]
    assert error(step, expected) <= (1e-10 if law == "signs of both axes" else 1e-8)


def test_cyclic_step_keeps_phases_only() -> None:
    g = normal({"w": (7,)}, 0)["w"]
    step = precondition({"w": g}, {"w": g}, Symmetry({"w": "c"}, {"c": Cyclic()}))["w"]
    waves = torch.fft.fft(g)
    assert error(torch.fft.fft(step).abs(), torch.full((7,), math.sqrt(7), dtype=torch.float64)) <= 1e-9
    assert error(torch.fft.fft(step).angle(), waves.angle()) <= 1e-9


def test_geometric_mean_of_one_sided_estimates_is_shampoo() -> None:
    g = normal({"w": (5, 5)}, 3)["w"]
    one, other = (Symmetry({"w": pattern}, {"h": O()}) for pattern in ("_ h", "h _"))
    left, right = (orbit_average(s, {"w": g}).power(0.5).dense() for s in (one, other))
    root, back = dense_power(left, 0.5), dense_power(left, -0.5)
    mean = root @ dense_power(back @ right @ back, 0.5) @ root
    step = torch.linalg.solve(mean, g.flatten()).reshape(5, 5)
    shampoo = math.sqrt(5) * dense_power(g @ g.mT, -0.25) @ g @ dense_power(g.mT @ g, -0.25)
    assert error(step, shampoo) <= 1e-8


def test_a_single_trivial_copy_obeys_its_policy() -> None:
    symmetry, w, g = Symmetry({"b": "h"}, {"h": P()}), normal({"b": (5,)}, 0), normal({"b": (5,)}, 1)
    mean = float(g["b"].mean())
    for estimator in ("gradient", "riccati", "secant"):
        assert abs(float(precondition(w, g, symmetry, estimator)["b"].mean())) * math.sqrt(5) == pytest.approx(1)
        dropped = precondition(w, g, symmetry, estimator, trivial="drop")["b"].mean()
        assert abs(float(dropped)) <= 1e-12 < 1e-3 < abs(mean)


EQUIVARIANT = {
    "permutations": (RNN, RNN_SHAPES),
    "signed": (Symmetry({"b": "_ (h s)", "w": "(h s) (h s)", "gain": "h", "x": "(h s) h"}, {"h": P(), "s": S(per="h")}),
               {"b": (2, 5), "w": (5, 5), "gain": (5,), "x": (5, 5)}),
    "heads": (HEADS, HEADS_SHAPES),
    "orthogonal": (Symmetry({"w": "o o", "b": "o _"}, {"o": O()}), {"w": (5, 5), "b": (5, 2)}),
    "mixed": (MIXED, MIXED_SHAPES),
}


@pytest.mark.parametrize("estimator", ["gradient", "riccati", "secant"])
@pytest.mark.parametrize("name", EQUIVARIANT)
def test_five_steps_are_equivariant(name: str, estimator: str) -> None:
    """update(A w, A g) = A update(w, g), for a cubic equivariant gradient; not so for a rotation of everything."""
    symmetry, shapes = EQUIVARIANT[name]
    h, w = quadratic(symmetry, shapes, True), normal(shapes, 0)
    mixed = orbit_average(h.decomposition, normal(shapes, 6), normal(shapes, 7))
    h, mixed = h / float(h.frobenius()), mixed / float(mixed.frobenius())
    action = symmetry.bind(w)
    a = action.random(torch.Generator().manual_seed(3))

    def gradient(point: Params) -> Params:
        cubic = mixed @ (orbit_average(h.decomposition, point) @ point)
        return {k: x + cubic[k] for k, x in (h @ point).items()}

    def walk(point: Params) -> Params:
        for _ in range(5):
            step = precondition(point, gradient(point), symmetry, estimator, damping=1e-4)
            point = {k: x - 0.1 * step[k] for k, x in point.items()}
        return point

    moved, expected = walk(action.act(a, w)), action.act(a, walk(w))
    assert error(flat(moved), flat(expected)) <= 1e-10
    assert error(flat(expected), flat(w)) > 1e-3
    tilt = torch.linalg.qr(normal({"q": (flat(w).numel(),) * 2}, 4)["q"]).Q

    def tilted(point: Params) -> Params:
        parts = (tilt @ flat(point)).split([x.numel() for x in point.values()])
        return {k: part.reshape(x.shape) for (k, x), part in zip(point.items(), parts)}

    assert error(flat(walk(tilted(w))), flat(tilted(walk(w)))) > 1e-3


def test_an_element_that_is_no_symmetry_breaks_equivariance() -> None:
    w, g = normal(RNN_SHAPES, 0), normal(RNN_SHAPES, 1)
    other = Symmetry({"b": "_ (h s)", "w": "(h s) (h s)", "c": "(h s) _", "bias": "(h s)"}, {"h": P(), "s": S(per="h")})
    action = other.bind(w)
    a: Element = action.random(torch.Generator().manual_seed(0))
    moved = precondition(action.act(a, w), action.act(a, g), RNN)
    assert error(flat(moved), flat(action.act(a, precondition(w, g, RNN)))) > 1e-3


def test_wrong_arguments() -> None:
    w, g = normal(WIDE_SHAPES, 0), normal(WIDE_SHAPES, 1)
    with pytest.raises(ValueError, match="estimator must be one of gradient, riccati, secant; got 'newton'"):
        estimate(w, g, WIDE, "newton")
    with pytest.raises(ValueError, match="trivial must be one of drop, uncentred, diagonal, dense; got 'all'"):
        precondition(w, g, WIDE, trivial="all")
    with pytest.raises(ValueError, match="damping must be finite and >= 0; got -1"):
        precondition(w, g, WIDE, damping=-1.0)
    with pytest.raises(ValueError, match="grads: 'w' must have shape"):
        estimate(w, {"w": torch.zeros(5, 7)}, WIDE)
    with pytest.raises(ValueError, match="grads: 'x' is not among the parameters w"):
        estimate(w, {**g, "x": torch.zeros(2)}, WIDE)
    with pytest.raises(ValueError, match="grads: 'w' has entries that are not finite"):
        estimate(w, {"w": g["w"] / 0}, WIDE)
    with pytest.raises(ValueError, match="center: parameter 'w' of shape .* is missing"):
        estimate(w, g, WIDE, "secant", center={})
    with pytest.raises(SymmetryError):
        estimate({"v": w["w"]}, g, WIDE)
