"""Zeros, tiny sizes, few coordinates, half precision, large means, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from curvature_oracles import Params, dense_power, error, flat, normal

from symgeo import Symmetry
from symgeo.curvature import (
    Decomposition,
    DenseBlock,
    InvariantOperator,
    Moments,
    estimate,
    hessian,
    orbit_average,
    orbit_mean,
    precondition,
    trivial_block,
)
from symgeo.errors import SymmetryError
from symgeo.groups import Cyclic, Orthogonal, Permutation, SignFlip
from symgeo.symmetry import Compensation, Reader, Span

P, S, O = Permutation, SignFlip, Orthogonal  # noqa: E741
ESTIMATORS, POLICIES = ("gradient", "riccati", "secant"), ("drop", "uncentred", "diagonal", "dense")


def everything(n: int) -> tuple[Symmetry, dict[str, tuple[int, ...]]]:
    tensors = {"a": "h h", "b": "h _", "c": "(k s) (k s)", "d": "k", "e": "o o", "f": "z z", "g": "t t", "i": "(k s) k"}
    shapes: dict[str, tuple[int, ...]] = {"a": (n, n), "b": (n, 5), "c": (n, n), "d": (n,), "e": (n, n), "f": (n, n),
                                          "g": (n, n), "i": (n, n), "free": (2,)}
    groups = {"h": P(), "k": P(), "s": S(per="k"), "o": O(), "z": S(), "t": Cyclic()}
    return Symmetry(tensors, groups), shapes


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("eta", [0.0, 1e-4])
def test_tiny_sizes_and_zeros_stay_finite(n: int, estimator: str, eta: float) -> None:
    symmetry, shapes = everything(n)
    random, zero = normal(shapes, 0), {k: torch.zeros(s, dtype=torch.float64) for k, s in shapes.items()}
    equal = {k: torch.full(s, 0.1, dtype=torch.float64) for k, s in shapes.items()}
    tiny, huge = ({k: scale * x for k, x in random.items()} for scale in (1e-30, 1e30))
    for w, g in ((random, normal(shapes, 1)), (zero, random), (random, zero), (zero, zero), (equal, equal),
                 (random, tiny), (random, huge)):
        for policy in POLICIES:
            step = flat(precondition(w, g, symmetry, estimator, eta, policy))
            assert bool(torch.isfinite(step).all())
            assert bool(flat(g).any()) or not bool(step.any())
            operator = estimate(w, g, symmetry, estimator, policy, eta)
            if estimator != "secant":
                values = [s for s, _ in operator.eigvals()]
                assert min(values) >= -1e-6 * max(values)


def test_identical_units_have_no_centred_part() -> None:
    """Rounding errors of centring are not a direction: the step is as zero as the truth."""
    symmetry = Symmetry({"w": "h _", "b": "h"}, {"h": P()})
    row = torch.tensor([[0.1, 0.7, 1 / 3]], dtype=torch.float64)
    g = {"w": row.repeat(7, 1), "b": torch.full((7,), math.pi, dtype=torch.float64)}
    for policy in POLICIES:
        step = precondition(normal({"w": (7, 3), "b": (7,)}, 0), g, symmetry, trivial=policy)
        assert error(step["w"], step["w"].mean(0).expand(7, 3)) <= 1e-12
    assert not flat(precondition(g, g, symmetry, trivial="drop")).any()
    opposite = {"w": g["w"] * torch.tensor([1.0, -1, 1, -1, 1, -1, 0])[:, None], "b": g["b"]}
    assert orbit_average(symmetry, opposite).blocks[0].diagonal()[0, 0, :3].tolist() == [0.0, 0.0, 0.0]


def test_few_coordinates_give_a_pseudo_inverse() -> None:
    """Attention: M = 2 d_model copies of d = 3 coordinates; the step is the polar factor of rank 3."""
    symmetry = Symmetry({"q": "_ e", "k": "_ e"}, {"e": O()})
    g = normal({"q": (11, 3), "k": (11, 3)}, 0)
    u, _, vh = torch.linalg.svd(torch.cat([g["q"], g["k"]]), full_matrices=False)
    step = precondition(g, g, symmetry)
    assert error(torch.cat([step["q"], step["k"]]), math.sqrt(3) * u @ vh) <= 1e-10
    rank = [s for s, _ in orbit_average(symmetry, g).eigvals()]
    assert len(rank) == 4 and rank[-1] == 0.0
    assert sum(d for _, d in orbit_average(symmetry, g).eigvals()) == 66


def test_ill_conditioned_gradients_are_still_whitened() -> None:
    x = normal({"w": (5, 13)}, 0)["w"]
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    g = {"w": (u * torch.logspace(0, -9, 5, dtype=torch.float64)) @ vh}
    step = precondition(g, g, Symmetry({"w": "_ h"}, {"h": O()}))["w"]
    assert error(step, math.sqrt(13) * u @ vh) <= 1e-5


def test_half_precision_gradients() -> None:
    symmetry, shapes = everything(3)
    w, g = normal(shapes, 0), {k: x.bfloat16() for k, x in normal(shapes, 1).items()}
    exact = {k: x.double() for k, x in g.items()}
    for estimator in ESTIMATORS:
        step = precondition(w, g, symmetry, estimator, 1e-2)
        assert all(x.dtype == torch.bfloat16 for x in step.values())
        assert error(flat(step).double(), flat(precondition(w, exact, symmetry, estimator, 1e-2))) <= 1e-2


def test_large_means_in_single_precision() -> None:
    """Mean over standard deviation 1e3: the two passes of centring keep T_W to 1e-4."""
    symmetry = Symmetry({"w": "_ h"}, {"h": P()})
    x = {"w": (1000 + normal({"w": (5, 997)}, 0)["w"]).float()}
    exact = orbit_average(symmetry, x).blocks[1].to_dense().matrix
    decomposition = Decomposition(symmetry, x)
    single = decomposition.buckets[1].gram(decomposition.encode(x)[1])
    assert single.dtype == torch.float32
    assert float((single.double() - exact).norm() / exact.norm()) <= 1e-4
    assert float(torch.linalg.eigvalsh(single).min()) >= -1e-6 * float(single.abs().max())
    one_pass = (x["w"] @ x["w"].mT - torch.outer(x["w"].sum(1), x["w"].sum(1)) / 997) / 996
    assert float((one_pass.double() - exact[0, 0]).norm() / exact.norm()) > 1e-3


def test_averaged_moments_through_the_lower_level() -> None:
    """An exponential average of Gram matrices in single precision gives the operator of averaged dense matrices."""
    symmetry = Symmetry({"w": "_ h", "b": "h", "o": "_"}, {"h": P()})
    shapes = {"w": (3, 11), "b": (11,), "o": (2,)}
    decomposition = Decomposition(symmetry, normal(shapes, 0))
    trivial, bucket = decomposition.buckets
    grams, squares = torch.zeros(bucket.shape[0], 1, 4, 4), torch.zeros(trivial.copies)
    dense = torch.zeros(46, 46, dtype=torch.float64)
    for i in range(5):
        g = normal(shapes, i, torch.float32)
        x = decomposition.encode(g)
        grams, squares = 0.5 * grams + bucket.gram(x[1]), 0.5 * squares + x[0].flatten().square()
        wide = decomposition.encode(g, torch.float64)
        blocks = [trivial_block("diagonal", wide[0].flatten()), DenseBlock(bucket.gram(wide[1]))]
        dense = 0.5 * dense + InvariantOperator(decomposition, blocks).dense()
    moments = Moments(InvariantOperator(decomposition, [trivial_block("diagonal", squares.sqrt()), DenseBlock(grams)]))
    found = hessian("gradient", moments, 1e-3, inverse=True)
    assert error(found.dense(), dense_power(dense, -0.5, 1e-3)) <= 1e-4
    step = decomposition.decode(found.apply(decomposition.encode(g)))
    assert step["w"].dtype == torch.float32
    ordered = flat({k: step[k] for k in shapes}).double()
    assert error(ordered, dense_power(dense, -0.5, 1e-3) @ flat(g).double()) <= 1e-3
    with pytest.raises(ValueError, match="riccati needs the moments of the weights"):
        hessian("riccati", moments)
    with pytest.raises(ValueError, match="needed one block for each of 2 buckets; got 1"):
        InvariantOperator(decomposition, [DenseBlock(grams)])


UNCOVERED = {
    "three axes": ({"w": "h h h"}, {"h": P()}, (3, 3, 3), "parameter 'w': group 'h' acts on 3 axes"),
    "four axes": ({"w": "h h h h"}, {"h": O()}, (2, 2, 2, 2), "acts on 4 axes"),
    "deep": ({"w": "(h k) (h k)"}, {"h": P(), "k": P(per="h")}, (6, 6), "group 'h' acts on two axes, one of which"),
    "two inside": ({"w": "(h e f) h"}, {"h": P(), "e": O(per="h"), "f": O(per="h")}, (12, 3), "more inside than one"),
    "copies": ({"w": "(c e) (c e)"}, {"e": O(per="c")}, (6, 6), "copies that are numbered by different dimensions"),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_is_not_covered_is_refused(name: str) -> None:
    tensors, groups, shape, message = UNCOVERED[name]
    sizes = {"h": 3, "e": 2, "c": 3} if name in ("two inside", "copies", "deep") else None
    sizes = {k: v for k, v in (sizes or {}).items() if any(k in t.replace("(", " ").split() for t in tensors.values())}
    with pytest.raises(ValueError, match=message):
        orbit_mean(Symmetry(tensors, groups, sizes), {"w": torch.ones(shape)})


def test_copies_numbered_in_two_ways_are_refused() -> None:
    symmetry = Symmetry({"w": "(c e) (c f)", "v": "(c e f)"}, {"e": O(per="c"), "f": O(per="c")}, {"c": 2, "e": 3})
    with pytest.raises(SymmetryError, match="parameters 'w' and 'v': copies of e, f are numbered"):
        orbit_mean(symmetry, {"w": torch.ones(6, 10), "v": torch.ones(30)})


def test_sizes_that_disagree_are_refused() -> None:
    with pytest.raises(SymmetryError, match="'b'.*length 4"):
        orbit_mean(Symmetry({"a": "h", "b": "h"}, {"h": P()}), {"a": torch.ones(3), "b": torch.ones(4)})


def test_translations_need_no_average_and_shears_have_none() -> None:
    u = normal({"w": (5, 3), "b": (5,)}, 0)
    plain = Symmetry({"w": "h _", "b": "h"}, {"h": P()})
    shifted = Symmetry(plain.tensors, plain.groups, shifts={"t": {"b": "1"}})
    assert error(orbit_average(shifted, u).dense(), orbit_average(plain, u).dense()) == 0
    flow = Compensation((Span("b"),), (Reader("v", Span("c")),))
    sheared = Symmetry(plain.tensors, plain.groups, flows={"t": flow})
    whole = u | normal({"v": (2, 5), "c": (2,)}, 1)
    with pytest.raises(SymmetryError, match="flow 't' has no average: it is a shear"):
        orbit_mean(sheared, whole)
    assert error(orbit_average(sheared, whole, compact=True).dense(), orbit_average(plain, whole).dense()) == 0


def test_empty_parameters_do_no_harm() -> None:
    symmetry = Symmetry({"w": "h _"}, {"h": P()})
    u: Params = {"w": torch.ones(3, 0), "v": torch.arange(2.0)}
    assert torch.equal(precondition(u, u, symmetry)["v"], torch.tensor([0.0, 1.0]))
    assert precondition(u, u, symmetry)["w"].shape == (3, 0)


def test_frozen_parameters_have_no_step_and_may_be_absent() -> None:
    symmetry = Symmetry({"w": "h _", "b": "h", "v": "_ k"}, {"h": P(), "k": P()}, frozen=["v"])
    w, g = (normal({"w": (5, 3), "b": (5,), "v": (2, 7)}, seed) for seed in (0, 1))
    trainable = {name: g[name] for name in ("w", "b")}
    for estimator in ESTIMATORS:
        step = precondition(w, g, symmetry, estimator, 1e-3)
        assert not step["v"].any() and step["w"].all()
        other = precondition(w, {**trainable, "v": 100 * g["v"]}, symmetry, estimator, 1e-3)
        assert torch.equal(other["w"], step["w"])
        alone = precondition(w, trainable, symmetry, estimator, 1e-3)
        assert list(alone) == ["w", "b"] and torch.equal(alone["w"], step["w"])
        absent = precondition({name: w[name] for name in trainable}, trainable, symmetry, estimator, 1e-3)
        assert error(flat(absent), flat(alone)) <= 1e-12


def test_parameters_of_a_module_are_welcome() -> None:
    layer = torch.nn.Linear(3, 5)
    params = dict(layer.named_parameters())
    step = precondition(params, params, Symmetry({"weight": "h _", "bias": "h"}, {"h": P()}))
    assert not step["weight"].requires_grad and step["weight"].shape == (5, 3)
    operator = orbit_average(Symmetry({"weight": "h _"}, {"h": P()}), params)
    assert repr(operator) == "InvariantOperator(20 parameters in 2 kinds)"
    assert not operator.dense().requires_grad
