"""Cyclic shifts: as torch.roll, as a group, and as the symmetry of a circular convolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from symgeo import Symmetry, check
from symgeo.errors import SymmetryError
from symgeo.groups import Cyclic, Permutation


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [-8, -1, 0, 1, 6, 7, 20])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_acts_as_roll(k: int, axis: int) -> None:
    x = normal(5, 7, 3)
    for dual in (False, True):
        assert torch.equal(Cyclic().act(torch.tensor(k), x, axis=axis, dual=dual), x.roll(k, axis))


def test_has_n_elements() -> None:
    group, x = Cyclic(), torch.arange(5.0)
    drawn = group.random(5, (500,), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(range(5))
    assert len({tuple(group.act(k, x).tolist()) for k in drawn}) == 5
    assert group.identity(5, (2, 3)).shape == (2, 3)


def test_is_the_symmetry_of_a_circular_convolution() -> None:
    """Shifting both the hidden units and the filter that reads them moves the output alone."""
    x = normal(11, 3, seed=1)

    def f(p: dict[str, Tensor]) -> Tensor:
        hidden = torch.tanh(x @ p["w"].mT + p["b"])
        circulant = torch.stack([p["read"].roll(k) for k in range(7)])
        return (hidden @ circulant.mT).sort(-1).values

    params = {"w": normal(7, 3), "b": normal(7, seed=2), "read": normal(7, seed=3)}
    shifts = Symmetry({"w": "c _", "b": "c"}, {"c": Cyclic()})
    assert check(shifts, f, params, generator=torch.Generator().manual_seed(0)).invariance <= 1e-12
    permuted = Symmetry({"w": "c _", "b": "c"}, {"c": Permutation()})
    assert check(permuted, f, params, generator=torch.Generator().manual_seed(0)).invariance > 1e-3


def test_elements_of_a_bound_symmetry() -> None:
    symmetry = Symmetry({"w": "(H c) _"}, {"H": Permutation(), "c": Cyclic(per="H")}, {"H": 3})
    action = symmetry.bind({"w": normal(15, 2)})
    x = {"w": normal(15, 2)}
    g, h = (action.random(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    both = action.act(g, action.act(h, x))["w"]
    torch.testing.assert_close(action.act(action.compose(g, h), x)["w"], both)
    torch.testing.assert_close(action.act(action.inverse(g), action.act(g, x))["w"], x["w"])
    element = action.element({"c": torch.tensor([1, 0, 2])})
    expected = torch.stack([x["w"][:5].roll(1, 0), x["w"][5:10], x["w"][10:].roll(2, 0)]).flatten(0, 1)
    assert torch.equal(action.act(element, x)["w"], expected)
    assert symmetry.dimension(x) == 0 and symmetry.orthogonal


def test_copies_are_not_numbered_by_a_cyclic_factor() -> None:
    with pytest.raises(SymmetryError, match="on which Cyclic acts"):
        Symmetry({"w": "(c e)"}, {"c": Cyclic(), "e": Permutation(per="c")}, {"c": 2})
