"""The laws of every group, on one axis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from symgeo.errors import SymmetryError
from symgeo.groups import Cyclic, GeneralLinear, Group, Orthogonal, Permutation, PositiveScaling, Rotary, SignFlip

GROUPS: list[tuple[Group, int]] = [
    (Permutation(), 7),
    (SignFlip(), 7),
    (Cyclic(), 7),
    (PositiveScaling(), 7),
    (Orthogonal(), 5),
    (GeneralLinear(), 5),
    (GeneralLinear(), 1),
    (Rotary(), 6),
    (Rotary(pairing="interleaved"), 6),
]
CONTINUOUS = [(group, n) for group, n in GROUPS if not group.discrete]
DISCRETE = [(group, n) for group, n in GROUPS if group.discrete]
cases = pytest.mark.parametrize(("group", "n"), GROUPS, ids=str)
duals = pytest.mark.parametrize("dual", [False, True])


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=drawn(seed), dtype=torch.float64)


@cases
@duals
def test_composition_inverse_identity(group: Group, n: int, dual: bool) -> None:
    g, h = (group.random(n, (3,), drawn(seed), torch.float64) for seed in (0, 1))
    x = normal(3, 2, n)
    both = group.act(g, group.act(h, x, dual=dual), dual=dual)
    torch.testing.assert_close(group.act(group.compose(g, h), x, dual=dual), both, rtol=1e-12, atol=1e-12)
    back = group.act(group.inverse(g), group.act(g, x, dual=dual), dual=dual)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    assert torch.equal(group.act(group.identity(n, (3,), torch.float64), x, dual=dual), x)
    assert (group.act(g, x, dual=dual) - x).norm() > 1e-3 * x.norm()


@cases
def test_dual_keeps_the_pairing(group: Group, n: int) -> None:
    g = group.random(n, (), drawn(), torch.float64)
    x, y = normal(n), normal(n, seed=2)
    kept = group.act(g, x) @ group.act(g, y, dual=True)
    torch.testing.assert_close(kept, x @ y, rtol=1e-12, atol=1e-12)
    plain = group.act(g, x) @ group.act(g, y)
    assert (bool((plain - x @ y).abs() < 1e-12)) == group.orthogonal


@pytest.mark.parametrize(("group", "n"), DISCRETE, ids=str)
def test_discrete_groups_have_no_algebra(group: Group, n: int) -> None:
    assert not group.vertical(group.random_algebra(n, (2,), drawn(), torch.float64), normal(2, 3, n)).any()
    assert group.basis(n).shape == (0, *group.element_shape(n))


@pytest.mark.parametrize(("group", "n"), CONTINUOUS, ids=str)
@duals
def test_vertical_is_the_derivative(group: Group, n: int, dual: bool) -> None:
    x = normal(2, 3, n)
    xi = group.random_algebra(n, (2,), drawn(), torch.float64)
    one = group.identity(n, (2,), torch.float64)
    ahead, behind = (group.act(one + t * xi, x, dual=dual) for t in (1e-6, -1e-6))
    torch.testing.assert_close(
        group.vertical(xi, x, dual=dual), (ahead - behind) / 2e-6, rtol=1e-7, atol=1e-7
    )


@cases
def test_basis_and_orbit_dimension(group: Group, n: int) -> None:
    plain, dual = normal(2, n), normal(3, n, seed=2)
    basis = group.basis(n, torch.float64)
    assert len(basis) == group.dimension(n)
    moved = [torch.cat([group.vertical(xi, plain), group.vertical(xi, dual, dual=True)]) for xi in basis]
    rank = int(torch.linalg.matrix_rank(torch.stack(moved).flatten(1))) if moved else 0
    assert group.orbit_dimension(plain, dual) == rank


@cases
def test_axes_and_copies(group: Group, n: int) -> None:
    g = group.random(n, (2, 3), drawn(), torch.float64)
    x = normal(2, 3, n, 11)
    moved = group.act(g, x, axis=2)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(moved[i, j], group.act(g[i, j], x[i, j], axis=0))


@cases
def test_dtype_is_kept_and_seeds_repeat(group: Group, n: int) -> None:
    g = group.random(n, (), drawn(), torch.float64)
    assert torch.equal(g, group.random(n, (), drawn(), torch.float64))
    assert group.act(g, torch.ones(n, dtype=torch.float32)).dtype == torch.float32
    assert group.random(n).shape == group.element_shape(n)


def test_random_matrices_have_both_signs_and_are_well_conditioned() -> None:
    for group in (GeneralLinear(), Orthogonal()):
        g = group.random(3, (100,), drawn(), torch.float64)
        assert 20 < int((torch.linalg.det(g) > 0).sum()) < 80
        assert float(torch.linalg.cond(g).max()) < 200


def test_duals_are_inverse_transposes() -> None:
    g = GeneralLinear().random(5, (), drawn(), torch.float64)
    x = normal(5)
    torch.testing.assert_close(GeneralLinear().act(g, x, dual=True), torch.linalg.inv(g).mT @ x)


def test_rotary_commutes_with_rotations_of_its_pairs_only() -> None:
    turn = torch.polar(torch.ones(3), torch.tensor([0.3, 0.7, 1.1])).to(torch.complex128)
    x = normal(6)
    for pairing, other in (("half", "interleaved"), ("interleaved", "half")):
        group, wrong = Rotary(pairing=pairing), Rotary(pairing=other)
        g = group.random(6, (), drawn(), torch.float64)
        assert (group.act(turn, group.act(g, x)) - group.act(g, group.act(turn, x))).norm() < 1e-12
        assert (wrong.act(turn, group.act(g, x)) - group.act(g, wrong.act(turn, x))).norm() > 1e-3


def test_empty_rows_and_errors() -> None:
    assert GeneralLinear().act(torch.eye(3).expand(2, 3, 3), torch.zeros(2, 0, 3)).shape == (2, 0, 3)
    with pytest.raises(SymmetryError, match=r"GeneralLinear.*\(2, 5\).*\(\*batch, 5, 5\).*found \(3, 3\)"):
        GeneralLinear().act(torch.eye(3), torch.zeros(2, 5))
    with pytest.raises(SymmetryError, match="pairing"):
        Rotary(pairing="quarter")
    with pytest.raises(TypeError, match="abstract"):
        Group()  # type: ignore[abstract]
