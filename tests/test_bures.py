"""Full-rank factors modulo rotations."""

import pytest
import torch
from cases import manifold_case
from laws import LAWS, close

from manifolds import BuresWasserstein

M = BuresWasserstein()


def factor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, seed):
    law(manifold_case("bures", seed))


def test_horizontal_means_symmetric():
    x, u = factor(0, 2, 7, 3), factor(1, 2, 7, 3)
    cross = x.mT @ M.proju(x, u)
    close(cross, cross.mT, 1e-13)
    assert float((x.mT @ u - u.mT @ x).abs().max()) > 1e-3


def test_distance_in_closed_form():
    x, y = factor(0, 7, 3), factor(1, 7, 3)
    expected = x.square().sum() + y.square().sum() - 2 * torch.linalg.matrix_norm(x.mT @ y, "nuc")
    close(M.dist(x, y) ** 2, expected, 1e-13)


def test_distance_depends_on_orbits_only():
    x, y, q = factor(0, 7, 3), factor(1, 7, 3), torch.linalg.qr(factor(2, 3, 3)).Q
    assert float((x @ q - x).norm()) > 1
    close(M.dist(x @ q, y), M.dist(x, y), 1e-13)
    close(M.dist(x, x @ q), torch.zeros((), dtype=x.dtype), 1e-13)
    close(M.align(x, y @ q), M.align(x, y), 1e-13)
    assert abs(float(M.dist(x @ factor(3, 3, 3), y) - M.dist(x, y))) > 1e-3


def test_alignment_beats_every_rotation():
    x, y = factor(0, 7, 3), factor(1, 7, 3)
    for seed in range(20):
        q = torch.linalg.qr(factor(seed, 3, 3)).Q
        assert float((y @ q - x).norm()) >= float(M.dist(x, y))


@pytest.mark.parametrize("orthonormal", [False, True])
def test_derivatives_also_with_repeated_singular_values(orthonormal):
    x = factor(0, 5, 3)
    x = (torch.linalg.qr(x).Q if orthonormal else x).requires_grad_()
    y = (x.detach() @ torch.linalg.qr(factor(2, 3, 3)).Q if orthonormal else factor(1, 5, 3)).requires_grad_()
    u = factor(3, 5, 3).requires_grad_()
    for function, inputs in ((M.proju, (x, u)), (M.align, (x, y)), (M.logmap, (x, y))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_rank_deficient_points_are_reported():
    x = factor(0, 7, 3)
    x[:, 2] = x[:, 1]
    ok, reason = M.check_point_on_manifold(x, explain=True)
    assert not ok and "full column rank 3" in reason
    assert bool(torch.isfinite(M.proju(x, factor(1, 7, 3))).all())
    assert bool(torch.isfinite(M.logmap(x, torch.zeros_like(x))).all())
