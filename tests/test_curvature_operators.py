"""The algebra of invariant operators against dense float64 matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from curvature_oracles import dense_power, error, flat, normal
from scipy.sparse.linalg import cg
from torch import Tensor

from symgeo import Symmetry
from symgeo.curvature import Decomposition, InvariantOperator, StructuredBlock, orbit_average
from symgeo.curvature import structured as structured_module
from symgeo.groups import Cyclic, GeneralLinear, Orthogonal, Permutation, Rotary, SignFlip

SHAPES = {"w": (7, 7), "in": (7, 2), "q": (3, 10), "c": (5, 3), "s": (3, 2), "free": (2,)}
SYMMETRY = Symmetry(
    {"w": "h h", "in": "h _", "q": "_ (H e)", "c": "c _", "s": "s _"},
    {"h": Permutation(), "H": Permutation(), "e": Orthogonal(per="H"), "c": Cyclic(), "s": SignFlip()}, {"H": 5},
)


def positive(seed: int = 0, count: int = 24) -> InvariantOperator:
    """The sum of several averages: every block is regular, as every d is large enough together."""
    terms = [orbit_average(SYMMETRY, normal(SHAPES, 100 * seed + i)) for i in range(count)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def test_functions_equal_those_of_the_dense_matrix() -> None:
    operator, x = positive(), normal(SHAPES, 50)
    dense = operator.dense()
    assert float(torch.linalg.cond(dense)) < 1e6
    assert error(flat(operator @ x), dense @ flat(x)) <= 1e-9
    assert error(flat(operator.solve(x)), torch.linalg.solve(dense, flat(x))) <= 1e-9
    for p in (0.5, -0.5, 0.25, -0.25, 2, -1, -2):
        assert error(operator.power(p).dense(), dense_power(dense, p)) <= 1e-9
    assert error(operator.sqrt().dense(), dense_power(dense, 0.5)) <= 1e-9
    assert error(operator.inv().dense(), torch.linalg.inv(dense)) <= 1e-9
    assert error(operator.logdet(), torch.linalg.slogdet(dense).logabsdet) <= 1e-9
    assert error(operator.trace(), dense.trace()) <= 1e-9
    assert error(operator.frobenius(), torch.linalg.matrix_norm(dense)) <= 1e-9
    spectrum = torch.tensor([s for s, d in operator.eigvals() for _ in range(d)], dtype=torch.float64)
    assert error(spectrum, torch.linalg.eigvalsh(dense).flip(0)) <= 1e-9


@pytest.mark.parametrize("eta", [1e-4, 0.3])
def test_damping_is_relative_to_one_largest_eigenvalue(eta: float) -> None:
    u, x = normal(SHAPES, 0), normal(SHAPES, 50)
    for operator in (orbit_average(SYMMETRY, u), positive()):
        dense = operator.dense()
        largest = torch.linalg.eigvalsh(dense).max()
        shifted = dense + eta * largest * torch.eye(len(dense), dtype=torch.float64)
        for p in (0.5, -0.5, -0.25):
            assert error(operator.power(p, eta).dense(), dense_power(shifted, p)) <= 1e-9
        assert error(flat(operator.solve(x, eta)), torch.linalg.solve(shifted, flat(x))) <= 1e-9
        assert error(operator.inv(eta).dense(), torch.linalg.inv(shifted)) <= 1e-9
        assert error(operator.logdet(eta), torch.linalg.slogdet(shifted).logabsdet) <= 1e-9


def test_pseudo_inverse_of_a_singular_operator() -> None:
    operator = orbit_average(SYMMETRY, normal(SHAPES, 0))
    dense = operator.dense()
    assert error(operator.inv().dense(), torch.linalg.pinv(dense, rtol=1e-11, hermitian=True)) <= 1e-9
    assert error(operator.power(-0.5).dense(), dense_power(dense, -0.5)) <= 1e-9
    assert error(operator.power(0).dense(), dense_power(dense, 0)) <= 1e-9
    assert float(operator.logdet()) == -math.inf


def test_sums_multiples_and_products() -> None:
    a, b = positive(0, 3), positive(1, 2)
    x, y = a.dense(), b.dense()
    assert error((a + b).dense(), x + y) <= 1e-12
    assert error((2.5 * a - b / 4).dense(), 2.5 * x - y / 4) <= 1e-12
    assert error((-a).dense(), -x) <= 1e-12
    assert error((a @ b).dense(), x @ y) <= 1e-12
    assert error((a @ b @ a).power(0.5).dense(), dense_power(x @ y @ x, 0.5)) <= 1e-9
    assert error(a.congruent(b).dense(), y @ x @ y) <= 1e-12
    assert a.symmetric and not (a @ b).symmetric and (a @ b @ a).symmetric
    assert error((a @ b).inv().dense(), torch.linalg.pinv(x @ y, rtol=1e-13)) <= 1e-6


def test_indefinite_operators() -> None:
    operator = positive(0) - 2.0 * positive(1)
    dense = operator.dense()
    values = torch.linalg.eigvalsh(dense)
    assert float(values.min()) < -1e-2 < 1e-2 < float(values.max())
    x = normal(SHAPES, 50)
    assert error(flat(operator.solve(x)), torch.linalg.solve(dense, flat(x))) <= 1e-9
    assert error(operator.power(0.5).dense(), dense_power(dense, 0.5)) <= 1e-9
    assert error(operator.power(3).dense(), dense @ dense @ dense) <= 1e-9
    eta = 1e-2
    assert error(operator.power(-1, eta).dense(), dense_power(dense, -1, eta)) <= 1e-9
    assert error(operator.power(1, eta).dense(), dense_power(dense, 1, eta)) <= 1e-9


def test_operators_that_are_not_symmetric() -> None:
    u, v = normal(SHAPES, 0), normal(SHAPES, 1)
    operator = orbit_average(SYMMETRY, u, v)
    assert not operator.symmetric
    for call in (lambda: operator.power(0.5), operator.eigvals, operator.logdet, lambda: operator.inv(0.1)):
        with pytest.raises(ValueError, match="needs a symmetric operator; the block of kind"):
            call()
    dense = operator.dense()
    assert error(dense @ operator.inv().dense() @ dense, dense) <= 1e-9


def test_single_precision() -> None:
    # condition at most 1e2, by construction
    base = positive().power(0.25)
    x = normal(SHAPES, 50, torch.float32)
    dense = base.dense()
    assert float(torch.linalg.cond(dense)) < 1e2
    wide = flat(x).double()
    for result, expected in ((base @ x, dense @ wide), (base.solve(x), torch.linalg.solve(dense, wide))):
        assert all(t.dtype == torch.float32 for t in result.values())
        assert error(flat(result).double(), expected) <= 1e-4
    half = {name: t.bfloat16() for name, t in x.items()}
    assert all(t.dtype == torch.bfloat16 for t in (base @ half).values())
    decomposition = Decomposition(SYMMETRY, half)
    assert {t.dtype for t in decomposition.encode(half)} == {torch.float32, torch.complex64}
    single = decomposition.encode(x)
    for fast, exact in zip(base.apply(single), base.apply(decomposition.encode(x, torch.float64))):
        assert fast.dtype in (torch.float32, torch.complex64)
        assert error(fast.to(exact.dtype).abs(), exact.abs()) <= 1e-4


SQUARE = Symmetry({"w": "h h", "b": "h", "m": "_ h", "o": "_"}, {"h": Permutation()})


def square(n: int, seed: int = 0) -> dict[str, Tensor]:
    return normal({"w": (n, n), "b": (n,), "m": (2, n), "o": (3,)}, seed)


def test_transport_keeps_the_distinct_eigenvalues() -> None:
    operator = orbit_average(SQUARE, square(8))
    wide = operator.transport(square(16))
    found = [pair for pair in operator.eigvals() if abs(pair[0]) > 1e-10]
    moved = [pair for pair in wide.eigvals() if abs(pair[0]) > 1e-10]
    assert error(torch.tensor([s for s, _ in moved]), torch.tensor([s for s, _ in found])) <= 1e-10
    assert sorted({d for _, d in found}) == [1, 7, 20, 21]
    assert sorted({d for _, d in moved}) == [1, 15, 104, 105]
    for a, b in ((operator.inv(0.1).transport(square(16)), wide.inv(0.1)),
                 ((operator @ operator).transport(square(16)), wide @ wide),
                 (wide.transport(square(8)), operator)):
        assert error(a.dense(), b.dense()) <= 1e-10
    assert [d for _, d in operator.transport(square(3)).eigvals()].count(2) == 6


def test_transport_does_not_depend_on_which_blocks_are_alike() -> None:
    """At n = 3 the trivial copies of two parameters come from one call, at n = 5 from two."""
    symmetry = Symmetry({"a": "h _", "b": "k _"}, {"h": Permutation(), "k": Permutation()})
    small, large = {"a": (3, 2), "b": (3, 2)}, {"a": (5, 2), "b": (7, 2)}
    extra = {"z": (2, 3), "y": (7, 2)}
    operator = orbit_average(symmetry, normal({"z": extra["z"], **small, "y": extra["y"]}, 0))
    there = operator.transport(normal({"z": extra["z"], **large, "y": extra["y"]}, 1))
    back = there.transport(normal({"z": extra["z"], **small, "y": extra["y"]}, 1))
    assert error(back.dense(), operator.dense()) <= 1e-12
    assert error(there.trace(), there.dense().trace()) <= 1e-12


def test_transport_errors() -> None:
    operator = orbit_average(SQUARE, square(3))
    with pytest.raises(ValueError, match="no block of kind h:S"):
        operator.transport(square(5))
    with pytest.raises(ValueError, match="kind h:W has 1 x 6 copies.* 1 x 7 copies|kind trivial has"):
        operator.transport(normal({"w": (3, 3), "b": (3,), "m": (3, 3), "o": (3,)}, 0))
    signs = Symmetry({"b": "h"}, {"h": SignFlip()})
    with pytest.raises(ValueError, match="3 x 1 copies in the operator and 4 x 1"):
        orbit_average(signs, normal({"b": (3,)}, 0)).transport(normal({"b": (4,)}, 0))


def test_operators_of_different_parameters_do_not_combine() -> None:
    one, other = orbit_average(SQUARE, square(3)), orbit_average(SQUARE, square(4))
    coarser = orbit_average(Symmetry({"w": "h _", "b": "h", "m": "_ h"}, {"h": Permutation()}), square(3))
    for b in (other, coarser):
        for call in (lambda b=b: one + b, lambda b=b: one @ b, lambda b=b: one - b):
            with pytest.raises(ValueError, match="different symmetries, shapes or orders"):
                call()
    with pytest.raises(TypeError, match="got float"):
        one + 1.0  # type: ignore[operator]
    with pytest.raises(ValueError, match="'b' must have shape"):
        one @ {**square(3), "b": torch.zeros(4)}
    with pytest.raises(ValueError, match="'b' of shape .* is missing"):
        one @ {name: x for name, x in square(3).items() if name != "b"}
    for damping in (-1.0, math.nan):
        with pytest.raises(ValueError, match="damping must be finite and >= 0"):
            one.power(-1, damping)


def test_scipy() -> None:
    operator, x = positive(), normal(SHAPES, 50)
    damped = operator + 0.1 * operator.power(0)
    linear = damped.to_scipy()
    dense = damped.dense().numpy()
    vector = flat(x).numpy()
    np.testing.assert_allclose(linear @ vector, dense @ vector, rtol=1e-9, atol=1e-9)
    mixed = orbit_average(SYMMETRY, normal(SHAPES, 0), normal(SHAPES, 1))
    np.testing.assert_allclose(mixed.to_scipy().rmatvec(vector), mixed.dense().numpy().T @ vector, rtol=1e-9, atol=1e-9)
    solution, info = cg(linear, vector, rtol=1e-12, maxiter=2000)
    assert info == 0
    np.testing.assert_allclose(solution, np.linalg.solve(dense, vector), rtol=1e-6, atol=1e-8)


def test_dense_follows_the_order_given_and_is_limited() -> None:
    u = square(3)
    swapped = dict(reversed(u.items()))
    action = {name: i for i, name in enumerate(u)}
    blocks = torch.arange(flat(u).numel()).split([x.numel() for x in u.values()])
    order = torch.cat([blocks[action[name]] for name in swapped])
    assert error(orbit_average(SQUARE, swapped).dense(), orbit_average(SQUARE, u).dense()[order][:, order]) <= 1e-12
    with pytest.raises(ValueError, match="at most 8192 parameters, found 9000"):
        orbit_average(Symmetry({"b": "h"}, {"h": Permutation()}), {"b": torch.ones(9000)}).dense()


def test_frozen_parameters_are_zeros() -> None:
    symmetry = Symmetry({"a": "h", "b": "k"}, {"h": Permutation(), "k": Permutation()}, frozen=["b"])
    u = normal({"a": (5,), "b": (3,)}, 0)
    operator = orbit_average(symmetry, u)
    alone = orbit_average(Symmetry({"a": "h"}, {"h": Permutation()}), {"a": u["a"]})
    assert error(operator.dense()[:5, :5], alone.dense()) == 0
    assert not operator.dense()[5:].any() and not operator.dense()[:, 5:].any()
    result = operator.inv(0.1) @ u
    assert list(result) == ["a", "b"] and not result["b"].any() and result["a"].all()
    assert list(operator @ {"a": u["a"]}) == ["a"]
    assert not operator.diag()["b"].any()


def structured(seed: int, copies: int, rank: int, constant: bool, same: bool) -> StructuredBlock:
    numbers = normal({"d": (1 if constant else copies,), "l": (copies, rank), "r": (copies, rank)}, seed)
    return StructuredBlock(copies, numbers["d"], numbers["l"], numbers["l"] if same else numbers["r"])


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_structured_blocks_equal_dense_ones(constant: bool, rank: int) -> None:
    a, b = structured(0, 7, rank, constant, False), structured(1, 7, 2, True, True)
    x, y = a.to_dense().matrix[0, 0], b.to_dense().matrix[0, 0]
    vector = normal({"x": (1, 1, 7, 1)}, 2)["x"]
    assert error(a.added(b).to_dense().matrix[0, 0], x + y) <= 1e-12
    assert error(a.times(b).to_dense().matrix[0, 0], x @ y) <= 1e-12
    assert error(a.congruent(b).to_dense().matrix[0, 0], y @ x @ y.mT) <= 1e-12
    assert error(a.apply(vector)[0, 0, :, 0], x @ vector[0, 0, :, 0]) <= 1e-12
    assert error(a.trace(), x.trace()) <= 1e-12
    assert error(a.square(), x.square().sum()) <= 1e-12
    assert error(a.adjoint().to_dense().matrix[0, 0], x.mT) <= 1e-12
    assert a.symmetric == (rank == 0) and b.symmetric


@pytest.mark.parametrize(("rank", "constant"), [(0, True), (0, False), (1, True), (3, True), (7, True), (2, False)])
def test_functions_of_structured_blocks(rank: int, constant: bool) -> None:
    block = structured_module.simple(structured(3, 7, rank, constant, True))
    spectrum = block.spectrum()
    values, rest = spectrum.map(lambda s, zero: s.exp())
    expected = torch.linalg.matrix_exp(structured(3, 7, rank, constant, True).to_dense().matrix[0, 0])
    assert error(block.rebuilt(spectrum, values, rest).to_dense().matrix[0, 0], expected) <= 1e-9  # type: ignore[arg-type]


def test_the_trivial_kind_of_a_large_model_is_never_dense() -> None:
    u, v = {"w": torch.randn(300, 200).double()}, {"w": torch.randn(300, 200).double()}
    free = Symmetry({"w": "_ _"}, {})
    one, two = orbit_average(free, u), orbit_average(free, v)
    x = flat(u)
    step = (one + two).power(-0.5) @ u
    basis = torch.linalg.qr(torch.stack([x, flat(v)], dim=-1)).Q
    inside = torch.stack([basis.mT @ x, basis.mT @ flat(v)], dim=-1)
    core = inside @ inside.mT
    assert error(flat(step), basis @ (dense_power(core, -0.5) @ (basis.mT @ x))) <= 1e-9
    assert error((one + two).frobenius(), torch.linalg.matrix_norm(core)) <= 1e-9
    diagonal = StructuredBlock.diagonal_of(x.square())
    mixture = one + InvariantOperator(one.decomposition, [diagonal])
    with pytest.raises(ValueError, match="60000 copies .* too many for a dense matrix"):
        mixture.power(0.5)


def test_complex_kinds_of_compact_rotations() -> None:
    symmetry = Symmetry({"q": "_ e", "k": "_ e"}, {"e": Rotary()})
    shapes = {"q": (3, 6), "k": (2, 6)}
    terms = [orbit_average(symmetry, normal(shapes, i), compact=True) for i in range(6)]
    operator = sum(terms[1:], start=terms[0])
    assert [b.complex for b in operator.decomposition.buckets] == [True]
    dense = operator.dense()
    assert error(operator.power(-0.5).dense(), dense_power(dense, -0.5)) <= 1e-9
    assert error(operator.logdet(), torch.linalg.slogdet(dense).logabsdet) <= 1e-9
    assert all(d == 2 for _, d in operator.eigvals())
    rotated = orbit_average(Symmetry({"q": "_ e", "k": "_ e"}, {"e": GeneralLinear()}), normal(shapes, 0), compact=True)
    assert error(rotated.dense(), terms[0].dense()) > 1e-3


def test_a_mapping_is_not_changed() -> None:
    u: Mapping[str, Tensor] = square(4)
    before = {name: x.clone() for name, x in u.items()}
    operator = orbit_average(SQUARE, u)
    operator.inv(0.1) @ u
    assert all(torch.equal(u[name], before[name]) for name in u)
