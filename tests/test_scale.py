"""Vectors modulo positive scaling."""

import math

import pytest
import torch
from cases import manifold_case
from laws import LAWS, close

from manifolds import ScaleQuotient

M = ScaleQuotient()


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, seed):
    law(manifold_case("scale", seed))


def test_great_circle():
    x, u = vector(3.0, 0.0), vector(0.0, 1.5)
    for t in (0.0, 0.5, 1.0, 20.0):
        close(M.geodesic(x, u)(t), 3 * vector(math.cos(0.5 * t), math.sin(0.5 * t)), 1e-14)
    close(M.geodesic(x, u + x)(1.0), math.e * M.expmap(x, u), 1e-14)


def test_distance_is_the_angle_of_rays():
    x = vector(2.0, 0.0)
    for angle in (1e-9, 1e-3, 1.0, 3.0, math.pi - 1e-9, math.pi):
        y = 7 * vector(math.cos(angle), math.sin(angle))
        assert float(M.dist(x, y)) == pytest.approx(angle, rel=1e-7 if angle > 1e-3 else 1e-6)
    assert float(M.dist(x, 5 * x)) == 0
    close(M.logmap(x, 5 * x), vector(0.0, 0.0), 1e-15)


@pytest.mark.parametrize("angle", [1e-6, 0.05, 0.0999, 0.1002, 1.5, 1.6, 3.1])
def test_logarithm_over_all_angles(angle):
    x, y = vector(2.0, 0.0), 7 * vector(math.cos(angle), math.sin(angle))
    close(M.logmap(x, y), vector(0.0, 2 * angle), 1e-14)


def test_logarithm_is_smooth_where_the_points_meet():
    x = vector(1.0, 2.0, -1.0).requires_grad_()
    assert torch.autograd.gradcheck(M.logmap, (x, (2 * x).detach().requires_grad_()))
    assert torch.autograd.gradgradcheck(M.logmap, (x, (2 * x).detach().requires_grad_()))


def test_transport_is_parallel():
    g = torch.Generator().manual_seed(3)
    x, y, u, v = (torch.randn(2, 4, dtype=torch.float64, generator=g) for _ in range(4))
    close(M.inner(y, M.transp(x, y, u), M.transp(x, y, v)), M.inner(x, u, v), 1e-13)
    h = M.logmap(x, y)
    close(M.transp(x, 5 * y, h), -M.logmap(5 * y, x), 1e-13)
    opposite = M.transp(x, -2 * x, u)
    close(M.inner(-2 * x, opposite), M.inner(x, u), 1e-13)


def test_opposite_and_zero_vectors_are_reported():
    x = torch.stack([vector(1.0, 2.0), vector(1.0, 0.0)])
    with pytest.raises(ValueError, match="opposite in 1 of 2"):
        M.logmap(x, torch.stack([vector(1.0, 1.0), vector(-3.0, 0.0)]))
    with pytest.raises(ValueError, match="y needs finite nonzero vectors; 1 of 2"):
        M.dist(x, torch.stack([vector(1.0, 1.0), vector(0.0, 0.0)]))
    assert M.check_point_on_manifold(vector(0.0, 0.0), explain=True) == (False, "x has vectors that are zero")


def test_zero_vectors_are_left_out():
    x, u = vector(0.0, 0.0).requires_grad_(), vector(1.0, 2.0).requires_grad_()
    for value in (M.inner(x, u), *M.proju(x, u), *M.expmap(x, u), *M.christoffel(x, u)):
        assert float(value.detach()) == 0
        for gradient in torch.autograd.grad(value, (x, u), allow_unused=True, retain_graph=True):
            assert gradient is None or bool(torch.isfinite(gradient).all())


def test_vertical_takes_both_shapes():
    x = torch.ones(3, 2, dtype=torch.float64)
    scale = vector(1.0, 2.0, 3.0)
    close(M.vertical(x, scale), M.vertical(x, scale.unsqueeze(-1)), 0.0)
    close(M.vertical(x[0], scale[1]), vector(2.0, 2.0), 0.0)
