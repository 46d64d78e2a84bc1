"""Low-rank products against dense float64 algebra."""

from __future__ import annotations

import math
import time

import pytest
import torch
from laws import close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manifolds.low_rank import (
    Factors,
    LowRank,
    Tangent,
    ambient,
    distance,
    inner,
    norm,
    project,
    retract,
    svd_of_product,
    truncate,
    weighted_sum,
)

M, N, R = 13, 11, 3


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def product(seed: int, k: int = R, batch: tuple[int, ...] = (2,), dtype: torch.dtype = torch.float64) -> Factors:
    return normal(seed, *batch, M, k, dtype=dtype), normal(seed + 100, *batch, k, N, dtype=dtype)


def dense(x: LowRank) -> Tensor:
    return (x.u * x.s.unsqueeze(-2).to(x.u.dtype)) @ x.v.mH


def tangent_projection(x: LowRank, y: Tensor) -> Tensor:
    left, right = x.u @ x.u.mH, x.v @ x.v.mH
    return left @ y + y @ right - left @ y @ right


def real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


class Largest(TorchDispatchMode):
    """Records the number of entries of the largest tensor any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, list | tuple) else (out,):
            if isinstance(value, Tensor):
                self.entries = max(self.entries, value.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("k", [1, 3, 12, 17])
def test_svd_of_a_product(k, dtype):
    b, a = product(0, k, dtype=dtype)
    x = svd_of_product(b, a)
    assert x.u.shape == (2, M, min(k, N)) and x.v.shape == (2, N, min(k, N))
    close(real(dense(x)), real(b @ a), 1e-14)
    close(x.s, torch.linalg.svdvals(b @ a)[..., : min(k, N)], 1e-13)
    for q in (x.u, x.v):
        close(real(q.mH @ q), real(torch.eye(min(k, N), dtype=dtype).expand(2, -1, -1)), 1e-14)


def test_factors_without_full_rank_and_zero():
    b, a = product(0)
    b[0, :, 2], a[1] = b[0, :, 1], 0
    x = svd_of_product(b, a)
    close(dense(x), b @ a, 1e-14)
    assert float(x.s[0, 2]) < 1e-14 and x.s[1].tolist() == [0, 0, 0]
    close(x.u.mT @ x.u, torch.eye(R, dtype=x.u.dtype).expand(2, -1, -1), 1e-14)


def test_truncation_is_the_closest_matrix():
    b, a = product(0, 7)
    x = svd_of_product(b, a)
    for rank in (1, 3, 7):
        cut = truncate(x, rank)
        expected = torch.linalg.svdvals(b @ a)[..., rank:].square().sum(-1).sqrt()
        close(torch.linalg.matrix_norm(dense(cut) - b @ a), expected, 1e-13)
    assert truncate(x, 8).s.shape == (2, 7)
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        truncate(x, 0)


def test_balanced_factors():
    x = svd_of_product(*product(0))
    b, a = x.factors()
    close(b @ a, dense(x), 1e-14)
    for square in (b.mT @ b, a @ a.mT):
        close(square, torch.diag_embed(x.s), 1e-13)


def test_sums_inner_products_and_distances():
    x, y, z = product(0), product(1, 5), product(2, 2)
    dense_x, dense_y, dense_z = (b @ a for b, a in (x, y, z))
    weights = [0.5, -2.0, normal(3, 2)]
    b, a = weighted_sum([x, y, z], weights)
    assert b.shape == (2, M, 10)
    close(b @ a, 0.5 * dense_x - 2 * dense_y + weights[2][:, None, None] * dense_z, 1e-14)
    close(inner(x, y), (dense_x * dense_y).sum((-2, -1)), 1e-13)
    close(norm(x), torch.linalg.matrix_norm(dense_x), 1e-14)
    close(distance(x, y), torch.linalg.matrix_norm(dense_x - dense_y), 1e-14)
    with pytest.raises(ValueError, match="one weight per product; got 2 and 1"):
        weighted_sum([x, y], [1.0])
    with pytest.raises(ValueError, match="got 0 and 0"):
        weighted_sum([])


def test_distances_keep_their_digits_where_products_cancel():
    """The distance of two gauges of one matrix is rounding, where Gram matrices would leave its square root."""
    b, a = product(0)
    gauge = torch.eye(R, dtype=b.dtype) + 0.3 * normal(5, R, R)
    x, y = (b, a), (b @ gauge, torch.linalg.solve(gauge, a))
    assert float((distance(x, y) / norm(x)).max()) < 1e-14
    from_grams = (inner(x, x) - 2 * inner(x, y) + inner(y, y)).abs().sqrt() / norm(x)
    assert float(from_grams.max()) > 1e-10
    tiny = (b, a + 1e-9 * normal(6, 2, R, N))
    expected = torch.linalg.matrix_norm(b @ (tiny[1] - a))
    assert float((distance(tiny, y) / expected - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_projection_onto_the_tangent_space(dtype):
    point = truncate(svd_of_product(*product(0, dtype=dtype)), R)
    (b, a), other = product(1, 5, dtype=dtype), product(2, 4, dtype=dtype)
    xi = project(point, b, a)
    close(real(torch.matmul(*ambient(point, xi))), real(tangent_projection(point, b @ a)), 1e-13)
    assert ambient(point, xi)[0].shape == (2, M, 2 * R)
    again = project(point, *ambient(point, xi))
    for part, same in zip(again, xi):
        close(real(part), real(same), 1e-13)
    close(inner(ambient(point, xi), other), inner((b, a), ambient(point, project(point, *other))), 1e-12)
    for q, part in ((point.u, xi.up), (point.v, xi.vp)):
        assert float((q.mH @ part).abs().max()) < 1e-13
    close(xi.norm(), norm(ambient(point, xi)), 1e-13)


def test_retraction_is_the_truncated_sum():
    point = truncate(svd_of_product(*product(0)), R)
    xi = project(point, *product(1, 5))
    moved = svd_of_product(*weighted_sum([point.factors(), ambient(point, xi)]))
    close(dense(retract(point, xi)), dense(truncate(moved, R)), 1e-13)
    u, s, vh = torch.linalg.svd(dense(point) + torch.matmul(*ambient(point, xi)))
    close(dense(retract(point, xi)), (u[..., :R] * s[..., None, :R]) @ vh[..., :R, :], 1e-13)
    still = retract(point, Tangent(*(0 * part for part in xi)))
    close(dense(still), dense(point), 1e-14)


def test_retraction_has_second_order():
    """``|R(t xi) - X - t xi - (t^2 / 2) II(xi, xi)|`` has slope 3, with ``II = 2 U_p S^-1 V_p^T``."""
    point = truncate(svd_of_product(*product(0, batch=())), R)
    xi = project(point, *product(1, 5, batch=()))
    straight, bend = torch.matmul(*ambient(point, xi)), 2 * (xi.up / point.s) @ xi.vp.mT
    errors = []
    for t in (2e-3, 1e-3):
        moved = dense(retract(point, Tangent(*(t * part for part in xi))))
        errors.append(float((moved - dense(point) - t * straight - 0.5 * t * t * bend).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.1)


def test_truncated_mean_is_stationary():
    """``P_T(X - mean)`` vanishes at the truncated singular value decomposition ``X`` of the mean, and nowhere near."""
    products, weights = [product(i) for i in range(4)], [0.1, 0.2, 0.3, 0.4]
    b, a = weighted_sum(products, weights)
    point = truncate(svd_of_product(b, a), R)
    gradient = project(point, *weighted_sum([point.factors(), (b, a)], [1.0, -1.0]))
    assert float((gradient.norm() / norm((b, a))).max()) < 1e-12
    other = svd_of_product(*products[0])
    assert float(project(other, *weighted_sum([other.factors(), (b, a)], [1.0, -1.0])).norm().min()) > 1e-3


def test_large_products_stay_thin():
    size, rank = 16384, 8
    products = [(normal(i, size, rank), normal(10 + i, rank, size)) for i in range(4)]
    start = time.process_time()
    with Largest() as largest:
        mean = truncate(svd_of_product(*weighted_sum(products, [0.25] * 4)), rank)
        xi = project(mean, *products[0])
        retract(mean, xi)
        assert float(distance(products[0], products[1])) > 0
    assert time.process_time() - start < 2.0
    assert largest.entries <= size * 4 * rank  # the concatenated factors; the matrix has 2^28 entries
    start = time.process_time()
    truncate(svd_of_product(*products[0]), rank // 2)
    assert time.process_time() - start < 0.5


def test_wrong_factors():
    b, a = product(0)
    with pytest.raises(ValueError, match=r"got \(2, 13, 3\) and \(2, 2, 11\)"):
        svd_of_product(b, a[:, :2])
    b[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="1 of 78 entries of b"):
        svd_of_product(b, a)
    single = svd_of_product(*(f.float() for f in product(0)))
    assert single.s.dtype == torch.float64
