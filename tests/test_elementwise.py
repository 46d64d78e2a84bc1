"""The elementwise metric."""

import pytest
import torch
from cases import manifold_case
from laws import LAWS, close

from manifolds import Elementwise

M = Elementwise()


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, seed):
    law(manifold_case("elementwise", seed))


def test_closed_forms():
    x, u, y = vector(2.0, -3.0), vector(1.0, 6.0), vector(4.0, -1.0)
    close(M.inner(x, u), vector(0.25 + 4.0).squeeze(), 1e-15)
    close(M.expmap(x, u), x * torch.exp(vector(0.5, -2.0)), 1e-15)
    close(M.dist(x, y), torch.log(vector(2.0, 1 / 3)).norm(), 1e-15)
    close(M.vertical(x, vector(1.0, 1.0)), vector(0.0, 0.0), 0.0)


def test_transport_is_an_isometry_that_undoes_itself():
    x, y, u, v = vector(2.0, -3.0), vector(4.0, -1.0), vector(1.0, 2.0), vector(-1.0, 0.5)
    close(M.inner(y, M.transp(x, y, u), M.transp(x, y, v)), M.inner(x, u, v), 1e-15)
    close(M.transp(y, x, M.transp(x, y, u)), u, 1e-15)
    close(M.transp(x, y, M.logmap(x, y)), -M.logmap(y, x), 1e-15)


def test_zero_entries_are_left_out():
    x, u = vector(2.0, 0.0), vector(1.0, 5.0)
    close(M.inner(x, u), vector(0.25).squeeze(), 1e-15)
    close(M.proju(x, u), vector(1.0, 0.0), 0.0)
    close(M.expmap(x, u), vector(2.0 * 1.6487212707001282, 0.0), 1e-15)
    close(M.logmap(x, M.expmap(x, u)), vector(1.0, 0.0), 1e-15)
    for method in ("taylor2", "linear"):
        assert M.geodesic(x, u, method)(1.0)[1] == 0
    close(M.transp(x, 2 * x, u), vector(2.0, 0.0), 1e-15)


def test_zero_entries_have_finite_derivatives():
    x, u = vector(2.0, 0.0).requires_grad_(), vector(1.0, 5.0).requires_grad_()
    for value in (M.inner(x, u), M.expmap(x, u).sum(), M.christoffel(x, u).sum(), M.dist(x, 2 * x)):
        for gradient in torch.autograd.grad(value, (x, u), allow_unused=True, retain_graph=True):
            assert gradient is None or bool(torch.isfinite(gradient).all())


def test_no_geodesic_across_zero():
    x = vector(1.0, 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="3 of 4 components"):
        M.logmap(x, vector(-1.0, 0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="1 of 4 components"):
        M.dist(x, vector(float("nan"), 1.0, 1.0, 0.0))
