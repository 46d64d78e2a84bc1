"""Adapters of one weight for the tests of merging, and what they are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from symgeo.merge.factors import MergedFactors, merge_factors

M, N, RANK = 13, 11, 3
GEODESIC = ("geodesic-mix", "geodesic-inv")
METHODS = ("tsvd", "bures", *GEODESIC)
WEIGHTS = (0.5, 0.2, 0.3)
SPREAD = 0.06
Pairs = list[tuple[Tensor, Tensor]]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def unrelated(*ranks: int, m: int = M, n: int = N) -> Pairs:
    return [(random(2 * i, m, r), random(2 * i + 1, r, n)) for i, r in enumerate(ranks)]


def related(spread: float, count: int = 3, m: int = M, n: int = N, rank: int = RANK, seed: int = 0) -> Pairs:
    """Adapters around one: ``(B_0 + spread noise)(A_0 + spread noise)``."""
    b, a = random(100 + seed, m, rank), random(200 + seed, rank, n)
    shifts = [100 * seed + 10 * i for i in range(1, count + 1)]
    return [(b + spread * random(i, m, rank), a + spread * random(i + 1, rank, n)) for i in shifts]


def commuting(values: Tensor, seed: int = 0) -> tuple[Pairs, Tensor, Tensor]:
    """Adapters ``U diag(s_i) V^T`` in random gauges, with ``U`` and ``V``."""
    rank = values.shape[1]
    u, v = torch.linalg.qr(random(seed, M, rank)).Q, torch.linalg.qr(random(seed + 1, N, rank)).Q
    return regauged([(u * s, v.mT) for s in values], seed + 2), u, v


def regauged(pairs: Pairs, seed: int, condition: float = 10.0) -> Pairs:
    """``(B G^-1, G A)`` with independent random ``G``."""
    result = []
    for i, (b, a) in enumerate(pairs):
        u, _, vh = torch.linalg.svd(random(seed + i, b.shape[1], b.shape[1]))
        g = (u * torch.logspace(0, math.log10(condition), b.shape[1], dtype=torch.float64)) @ vh
        result.append((torch.linalg.solve(g, b, left=False), g @ a))
    return result


def product(x: MergedFactors) -> Tensor:
    return x.B @ x.A


def delta(pairs: Pairs, method: str, weights: tuple[float, ...] | None = WEIGHTS, **options: object) -> Tensor:
    return product(merge_factors(pairs, weights, method, **options))


def change(x: Tensor, y: Tensor) -> float:
    assert bool(torch.isfinite(x).all() and torch.isfinite(y).all())
    return float((x - y).norm() / y.norm())


def toy(*pairs: tuple[float, float]) -> Pairs:
    return [(torch.tensor([[b]], dtype=torch.float64), torch.tensor([[a]], dtype=torch.float64)) for b, a in pairs]


def balanced(x: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return torch.cat([u[:, :rank], vh.mT[:, :rank]]) * s[:rank].sqrt()
