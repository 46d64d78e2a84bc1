"""R1 and R2 against the average over every element, and what the isotypic form says about them."""

from __future__ import annotations

import pytest
import torch
from curvature_oracles import CASES, Case, cyclic, error, flat, heads, normal, permuted, signed

from symgeo import Symmetry
from symgeo.curvature import Decomposition, InvariantOperator, orbit_average, orbit_mean
from symgeo.groups import Orthogonal, Permutation, SignFlip

cases = pytest.mark.parametrize("case", CASES, ids=str)


@cases
def test_averages_equal_enumeration(case: Case) -> None:
    u, v = case.params(0), case.params(1)
    mean, mixed = case.average(u, v)
    _, square = case.average(u, u)
    assert error(flat(orbit_mean(case.symmetry, u, case.compact)), mean) <= 1e-12
    operator = orbit_average(case.symmetry, u, compact=case.compact)
    assert error(operator.dense(), square) <= 1e-12
    assert error(orbit_average(case.symmetry, u, v, case.compact).dense(), mixed) <= 1e-12


@cases
def test_scalars_diagonals_and_eigenvalues_equal_the_dense_matrix(case: Case) -> None:
    u, v = case.params(0), case.params(1)
    for operator in (orbit_average(case.symmetry, u, compact=case.compact),
                     orbit_average(case.symmetry, u, v, case.compact)):
        dense = operator.dense()
        assert error(operator.trace(), dense.trace()) <= 1e-12
        assert error(operator.frobenius(), torch.linalg.matrix_norm(dense)) <= 1e-12
        assert error(flat(operator.diag()), dense.diagonal()) <= 1e-12
        assert error(operator.T.dense(), dense.mT) <= 1e-12
    dense = orbit_average(case.symmetry, u, compact=case.compact).dense()
    spectrum = sorted(s for s, d in orbit_average(case.symmetry, u, compact=case.compact).eigvals() for _ in range(d))
    assert error(torch.tensor(spectrum, dtype=torch.float64), torch.linalg.eigvalsh(dense)) <= 1e-12


@cases
def test_encode_is_an_isometry_with_the_right_dimensions(case: Case) -> None:
    u = case.params(0)
    decomposition = Decomposition(case.symmetry, u, case.compact)
    coordinates = decomposition.encode(u)
    back = decomposition.decode(coordinates)
    assert error(flat({name: back[name] for name in u}), flat(u)) <= 1e-12
    energy = torch.stack([x.abs().square().sum() for x in coordinates]).sum()
    assert error(energy, flat(u).square().sum()) <= 1e-12
    assert [tuple(x.shape) for x in coordinates] == [bucket.shape for bucket in decomposition.buckets]
    dimensions = [len(b.kinds) * b.batch * b.copies * b.dimension for b in decomposition.buckets]
    assert sum(dimensions) == flat(u).numel()


@pytest.mark.parametrize("case", [permuted(4), signed(3), cyclic(5), heads(2, 5, True)], ids=str)
def test_averaging_is_an_orthogonal_projection(case: Case) -> None:
    """Extended linearly to dense matrices, R2 is idempotent and self-adjoint, and keeps the cone of PSD matrices."""
    small = Case(case.name, {"w": case.shapes["w"]}, {"w": case.tensors["w"]}, case.groups, case.elements, case.sizes)
    shapes = small.shapes

    def project(s: torch.Tensor) -> torch.Tensor:
        u, values, vh = torch.linalg.svd(s)
        decomposition = Decomposition(small.symmetry, normal(shapes, 0))
        total = None
        for k in range(len(values)):
            left, right = decomposition.unflatten(u[:, k] * values[k]), decomposition.unflatten(vh[k])
            term = orbit_average(decomposition, left, right)
            total = term if total is None else total + term
        assert isinstance(total, InvariantOperator)
        return total.dense()

    n = flat(normal(shapes, 0)).numel()
    s, t = normal({"s": (n, n)}, 1)["s"], normal({"s": (n, n)}, 2)["s"]
    once, other = project(s), project(t)
    assert error(project(once), once) <= 1e-11
    assert abs(float((once * t).sum() - (s * other).sum())) <= 1e-11 * float(torch.linalg.matrix_norm(s)) ** 2
    assert error(once, s) > 1e-3
    semidefinite = torch.linalg.eigvalsh(orbit_average(small.symmetry, normal(shapes, 3)).dense())
    assert float(semidefinite.min()) >= -1e-12 * float(semidefinite.max())


ROTATED = Symmetry(
    {"q": "_ (H e)", "w": "(H e) (H e)", "m": "o o", "v": "o _"},
    {"H": Permutation(), "e": Orthogonal(per="H"), "o": Orthogonal()}, {"H": 3},
)
SHAPES = {"q": (2, 15), "w": (15, 15), "m": (7, 7), "v": (7, 3)}


def test_operators_commute_with_haar_elements() -> None:
    u, v = normal(SHAPES, 0), normal(SHAPES, 1)
    action, generator = ROTATED.bind(u), torch.Generator().manual_seed(0)
    operator, mixed = orbit_average(ROTATED, u), orbit_average(ROTATED, u, v)
    assert abs(float(mixed.trace() - flat(u) @ flat(v))) <= 1e-12 * float(flat(u).norm() * flat(v).norm())
    x = normal(SHAPES, 2)
    for _ in range(10):
        g = action.random(generator)
        for s in (operator, mixed):
            assert error(flat(s @ action.act(g, x)), flat(action.act(g, s @ x))) <= 1e-12
    skewed = {name: 1.5 * t if name == "q" else t for name, t in x.items()}
    assert error(flat(operator @ skewed), flat(operator @ x)) > 1e-3


def test_haar_mean() -> None:
    """20000 Haar elements of O(3) on a 3 x 3 tensor and a vector."""
    symmetry = Symmetry({"w": "e e", "b": "e"}, {"e": Orthogonal()})
    u = normal({"w": (3, 3), "b": (3,)}, 0)
    g = Orthogonal().random(3, (20000,), torch.Generator().manual_seed(0), torch.float64)
    orbit = torch.cat([(g @ u["w"] @ g.mT).flatten(1), g @ u["b"]], dim=-1)
    mean = orbit.mT @ orbit / len(orbit)
    dense = orbit_average(symmetry, u).dense()
    assert float(torch.linalg.matrix_norm(dense - mean) / torch.linalg.matrix_norm(mean)) <= 5e-2


def test_a_larger_group_gives_another_average() -> None:
    """The negative control: signs are no symmetry of the permuted average, and one axis freed changes it."""
    case = permuted(4)
    u = case.params(0)
    _, square = case.average(u, u)
    freed = Symmetry({**case.tensors, "b": "_"}, case.groups)
    signed_too = Symmetry({"w": "(h s) (h s)", "b": "(h s)", "m": "_ (h s)"},
                          {"h": Permutation(), "s": SignFlip(per="h")})
    for other in (freed, signed_too):
        assert error(orbit_average(other, u).dense(), square) > 1e-3


def test_batches_instead_of_loops() -> None:
    """Twelve layers of three heads: as many buckets as one layer has, with twelve kinds each."""
    layer = Symmetry({"q": "(H e) _", "k": "(H e) _", "up": "h _", "down": "_ h"},
                     {"H": Permutation(), "e": Orthogonal(per="H"), "h": Permutation()}, {"H": 3})
    params = {f"layers.{i}.{name}": x for i in range(12)
              for name, x in normal({"q": (6, 5), "k": (6, 5), "up": (7, 5), "down": (5, 7)}, i).items()}
    many = Decomposition(layer.each("layers.*"), params)
    assert [len(bucket.kinds) for bucket in many.buckets] == [1, 12, 12]
    one = Decomposition(layer, {name[9:]: x for name, x in params.items() if name.startswith("layers.3.")})
    whole = many.encode(params)
    single = one.encode({name: params[f"layers.3.{name}"] for name in ("q", "k", "up", "down")})
    for x, y in zip(whole[1:], single[1:]):
        assert torch.equal(x[3], y[0])
