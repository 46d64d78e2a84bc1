"""The balanced gauge, averages over maximal compact subgroups, and the declarations that optimizers rely on."""

from __future__ import annotations

import pytest
import torch
from curvature_oracles import Params, error, flat, normal
from networks import MODELS, language_loss, params_of
from torch import Tensor

from symgeo import Symmetry, check, find_symmetry
from symgeo.curvature import balance, dual, estimate, orbit_average, orbit_mean, precondition
from symgeo.errors import SymmetryError
from symgeo.groups import GeneralLinear, Orthogonal, Permutation, PositiveScaling, Rotary, SignFlip
from symgeo.symmetry import Action

LORA = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})
LORA_SHAPES = {"B": (11, 3), "A": (3, 7), "bias": (2,)}
ATTENTION = Symmetry(
    {"q": "(H e) _", "k": "(H e*) _", "bq": "(H e)", "v": "(H f) _", "o": "_ (H f*)", "up": "(h a) _",
     "down": "_ (h* a*)"},
    {"H": Permutation(), "e": GeneralLinear(per="H"), "f": GeneralLinear(per="H"), "h": Permutation(),
     "a": PositiveScaling(per="h")}, {"H": 2},
)
ATTENTION_SHAPES = {"q": (6, 5), "k": (6, 5), "bq": (6,), "v": (4, 5), "o": (5, 4), "up": (7, 5), "down": (5, 7)}
ROPE = Symmetry({"q": "(H e) _", "k": "(H e*) _"}, {"H": Permutation(), "e": Rotary(per="H", pairing="interleaved")},
                {"H": 3})
ROPE_SHAPES = {"q": (12, 5), "k": (12, 5)}
DEEP = Symmetry({"w1": "a _", "w2": "b a*", "w3": "_ b*"}, {"a": GeneralLinear(), "b": GeneralLinear()})
DEEP_SHAPES = {"w1": (3, 7), "w2": (3, 3), "w3": (11, 3)}
CASES = {"lora": (LORA, LORA_SHAPES), "attention": (ATTENTION, ATTENTION_SHAPES), "rope": (ROPE, ROPE_SHAPES),
         "deep": (DEEP, DEEP_SHAPES)}


def imbalance(action: Action, params: Params) -> float:
    """The largest relative violation of the balance equations."""
    worst = 0.0
    for name, group in action.groups.items():
        plain, other = action.stack(name, params)
        if isinstance(group, GeneralLinear):
            worst = max(worst, error(plain.mT @ plain, other.mT @ other))
        if isinstance(group, PositiveScaling):
            worst = max(worst, error(plain.norm(dim=-2), other.norm(dim=-2)))
        if isinstance(group, Rotary):
            first, second = (x.square().sum(-2).unflatten(-1, (-1, 2)).sum(-1) for x in (plain, other))
            worst = max(worst, error(first, second))
    return worst


@pytest.mark.parametrize("name", CASES)
def test_balance(name: str) -> None:
    symmetry, shapes = CASES[name]
    params = normal(shapes, 0)
    action = symmetry.bind(params)
    balanced, element = balance(symmetry, params)
    moved = action.act(element, params)
    assert all(torch.equal(balanced[k], moved[k]) for k in params)
    assert imbalance(action, balanced) <= 1e-10 < 1e-3 < imbalance(action, params)
    again, one = balance(symmetry, balanced)
    assert error(flat(again), flat(balanced)) <= 1e-10
    g = action.random(torch.Generator().manual_seed(0))
    there, _ = balance(symmetry, action.act(g, params))
    left, right = (orbit_average(symmetry, x, compact=True) for x in (balanced, there))
    assert error(left.dense(), right.dense()) <= 1e-9
    unbalanced = orbit_average(symmetry, action.act(g, params), compact=True)
    assert error(orbit_average(symmetry, params, compact=True).dense(), unbalanced.dense()) > 1e-3
    assert set(one) == {n for n, group in action.groups.items() if not group.orthogonal}


def test_balanced_points_have_least_norm() -> None:
    params = normal(LORA_SHAPES, 0)
    action, (balanced, _) = LORA.bind(params), balance(LORA, params)
    for seed in range(5):
        other = action.act(action.random(torch.Generator().manual_seed(seed)), params)
        assert float(flat(other).norm()) > float(flat(balanced).norm())
    b, a = balanced["B"], balanced["A"]
    assert error(b @ a, params["B"] @ params["A"]) <= 1e-12


def test_degenerate_pairs_have_a_finite_gauge() -> None:
    params = normal(LORA_SHAPES, 0)
    start = {**params, "B": torch.zeros(11, 3, dtype=torch.float64)}
    balanced, element = balance(LORA, start)
    assert torch.equal(balanced["A"], start["A"]) and torch.equal(element["r"], torch.eye(3, dtype=torch.float64))
    deficient = {**params, "B": params["B"] @ torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))}
    balanced, element = balance(LORA, deficient)
    assert bool(torch.isfinite(flat(balanced)).all()) and float(torch.linalg.cond(element["r"])) < 1e6
    assert error(balanced["B"] @ balanced["A"], deficient["B"] @ deficient["A"]) <= 1e-9
    for point in (start, deficient, {k: torch.zeros_like(x) for k, x in params.items()}):
        step = precondition(point, params, LORA, compact=True, damping=1e-4)
        assert bool(torch.isfinite(flat(step)).all())
    scaled = Symmetry({"u": "h", "v": "h*"}, {"h": PositiveScaling()})
    point = {"u": torch.tensor([0.0, 4.0, 0.0]), "v": torch.tensor([3.0, 1.0, 0.0])}
    assert balance(scaled, point)[0]["u"].tolist() == [0.0, 2.0, 0.0]


def test_deficient_pairs_in_a_chain_come_to_rest() -> None:
    """A layer of rank 3 before one of width 5 leaves directions that no gauge balances."""
    params = normal({"w1": (3, 7), "w2": (5, 3), "w3": (11, 5)}, 0)
    balanced, _ = balance(DEEP, params)
    product = [p["w3"] @ p["w2"] @ p["w1"] for p in (params, balanced)]
    assert error(product[1], product[0]) <= 1e-9
    assert error(balanced["w1"] @ balanced["w1"].mT, balanced["w2"].mT @ balanced["w2"]) <= 1e-9


def test_one_sided_groups_are_refused() -> None:
    with pytest.raises(SymmetryError, match="group 'r' acts on one side only: no parameter carries 'r\\*'"):
        balance(Symmetry({"B": "_ r"}, {"r": GeneralLinear()}), {"B": torch.ones(3, 2)})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("estimator", ["gradient", "riccati", "secant"])
def test_steps_move_along_with_every_representative(name: str, estimator: str) -> None:
    """update(A w, A^-T g) = A update(w, g) for non-compact A; without balancing the step does depend on it."""
    symmetry, shapes = CASES[name]
    w, g = normal(shapes, 0), normal(shapes, 1)
    action = symmetry.bind(w)
    a = action.random(torch.Generator().manual_seed(0))
    continuous = {n: x for n, x in a.items() if not action.groups[n].orthogonal}
    step = precondition(w, g, symmetry, estimator, 1e-4, compact=True)
    part = action.element(continuous)
    expected, there = action.act(part, step), action.act(part, w)
    moved = precondition(there, action.act(dual(action, part), g), symmetry, estimator, 1e-4, compact=True)
    assert error(flat(moved), flat(expected)) <= 1e-8
    wrong = precondition(there, action.act(part, g), symmetry, estimator, 1e-4, compact=True)
    assert error(flat(wrong), flat(expected)) > 1e-3


@pytest.mark.parametrize("name", ["llama", "tiny_vit"])
def test_models_step_equivariantly(name: str) -> None:
    """True gradients of a network at two representatives of the same function."""
    model = MODELS[name]()
    params, symmetry = params_of(model), find_symmetry(model)
    if name == "llama":
        loss, (batch, _) = language_loss(model)
    else:
        x = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def loss(p: Params, batch: Tensor) -> Tensor:
            return torch.func.functional_call(model, p, (batch,)).logsumexp(-1).square().sum()

        batch = x
    action = symmetry.bind(params)
    a = action.random(torch.Generator().manual_seed(0), only=list(action.groups))
    moved = action.act(a, params)
    g, there = (torch.func.grad(lambda p: loss(p, batch))(p) for p in (params, moved))
    step = precondition(params, g, symmetry, damping=1e-4, compact=True)
    found, expected = precondition(moved, there, symmetry, damping=1e-4, compact=True), action.act(a, step)
    assert error(flat(found), flat(expected)) <= 1e-5
    assert error(flat(expected), flat(step)) > 1e-3


def test_compact_estimates_live_in_the_balanced_gauge() -> None:
    w, g = normal(ATTENTION_SHAPES, 0), normal(ATTENTION_SHAPES, 1)
    balanced, element = balance(ATTENTION, w)
    action = ATTENTION.bind(w)
    inside = action.act(dual(action, element), g)
    operator = estimate(w, g, ATTENTION, damping=1e-3, compact=True)
    compact = Symmetry(ATTENTION.tensors, {"H": Permutation(), "e": Orthogonal(per="H"), "f": Orthogonal(per="H"),
                                           "h": Permutation()}, {"H": 2, "a": 1})
    assert error(operator.dense(), estimate(balanced, inside, compact, damping=1e-3).dense()) <= 1e-10
    step = precondition(w, g, ATTENTION, damping=1e-3, compact=True)
    assert error(flat(operator @ action.act(element, step)), flat(inside)) <= 1e-8


def test_noether_identities() -> None:
    """Q^T gQ = gK^T K and V^T gV = gO O^T: the gradient of an invariant loss is horizontal."""
    p = normal({"q": (5, 3), "k": (5, 3), "v": (5, 2), "o": (2, 5)}, 0)
    x = normal({"x": (7, 5)}, 1)["x"]

    def loss(p: Params) -> Tensor:
        attention = ((x @ p["q"]) @ (x @ p["k"]).mT).softmax(-1)
        return (attention @ x @ p["v"] @ p["o"]).square().sum()

    g = torch.func.grad(loss)(p)
    assert error(p["q"].mT @ g["q"], g["k"].mT @ p["k"]) <= 1e-10
    assert error(p["v"].mT @ g["v"], g["o"] @ p["o"].mT) <= 1e-10


def test_non_compact_groups_are_refused_with_the_reason() -> None:
    shapes = normal(LORA_SHAPES, 0)
    message = r"group 'r' \(GeneralLinear\) has no average: .* not compact.*compact=True"
    for call in (lambda: orbit_mean(LORA, shapes), lambda: orbit_average(LORA, shapes),
                 lambda: estimate(shapes, shapes, LORA), lambda: precondition(shapes, shapes, LORA)):
        with pytest.raises(SymmetryError, match=message):
            call()
    for group, reason in ((PositiveScaling(), "trivial"), (Rotary(), r"U\(1\) for each plane")):
        symmetry = Symmetry({"u": "h", "v": "h*"}, {"h": group})
        with pytest.raises(SymmetryError, match=reason):
            orbit_mean(symmetry, normal({"u": (4,), "v": (4,)}, 0))
    with pytest.raises(ValueError, match="compact=True needs the Symmetry itself"):
        operator = orbit_average(LORA, shapes, compact=True)
        precondition(shapes, shapes, operator.decomposition, compact=True)


def perceptron(activation: str, groups: dict[str, object], h: str, norm: str = "") -> float:
    """The error that `check` measures on a perceptron whose hidden axis carries h, after an optional LayerNorm."""
    x = normal({"x": (11, 3)}, 9)["x"]
    shapes = {"w": (7, 3), "b": (7,), "v": (5, 7), "gain": (7,), "shift": (7,)}
    tensors = {"w": f"{h} _", "b": h, "v": f"_ {h}"} | ({"gain": h, "shift": h} if norm == "permuted" else {})

    def f(p: Params) -> Tensor:
        y = x @ p["w"].mT + p["b"]
        y = torch.nn.functional.layer_norm(y, (7,), p["gain"], p["shift"]) if norm else y
        return getattr(torch, activation)(y) @ p["v"].mT

    report = check(Symmetry(tensors, groups), f, normal(shapes, 0), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return report.invariance


def test_check_tells_symmetries_from_others() -> None:
    permuted, signed = {"h": Permutation()}, {"h": Permutation(), "s": SignFlip(per="h")}
    for passed in (perceptron("tanh", signed, "(h s)"), perceptron("relu", permuted, "h"),
                   perceptron("tanh", permuted, "h", "permuted")):
        assert passed <= 1e-8
    for failed in (perceptron("relu", signed, "(h s)"), perceptron("tanh", permuted, "h", "free"),
                   perceptron("tanh", {"h": Orthogonal()}, "h")):
        assert failed >= 1e-2
