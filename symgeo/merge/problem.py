"""A merge in core coordinates: what every method is given, and what it returns.

``N`` adapters ``Delta_i = B_i A_i`` of one module shape live in the spans of all their columns and rows.  With
orthonormal bases of these, ``[B_1 .. B_N] = Q R`` and ``[A_1^T .. A_N^T] = P T``, the problem becomes one among
``k x l`` matrices, ``k, l <= sum r_i``: an isometry for every metric that sees only Gram matrices (derived here).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from manifolds.linalg import widen
from manifolds.low_rank import LowRank, svd_of_product

Factors = tuple[Tensor, Tensor]  # B (..., m, r), A (..., r, n)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ROUNDING = 1e-12  # singular values below this times the largest are taken for rounding error


@dataclass(frozen=True)
class Problem:
    """Adapters of a batch of modules, all of one shape, in float64 core coordinates.

    left : ``Q (modules, m, k)``;  right : ``P (modules, n, l)``, both with orthonormal columns;  adapters : per
    adapter its singular value decomposition, ``u (modules, k, r_i)``, ``s (modules, r_i)``, ``v (modules, l, r_i)``,
    which does not depend on the gauge of its factors;  weights : one number per adapter;  rank : of the result;
    seeds : one per module, for the methods that draw;  density : share of the entries that "ties" and its kin keep
    (None: each method's own).
    """

    left: Tensor
    right: Tensor
    adapters: tuple[LowRank, ...]
    weights: tuple[float, ...]
    rank: int
    seeds: tuple[int, ...]
    density: float | None = None

    @property
    def modules(self) -> int:
        """Number of modules in the batch."""
        return self.left.shape[0]

    def delta(self, index: int) -> Tensor:
        """Core coordinates ``(modules, k, l)`` of one adapter."""
        u, s, v = self.adapters[index]
        return (u * s.unsqueeze(-2)) @ v.mT

    def ranks(self) -> Tensor:
        """The rank of every adapter, ``(adapters, modules)``: singular values above rounding error."""
        return torch.stack([present(s).sum(-1) for _, s, _ in self.adapters])

    def balanced(self, index: int) -> Tensor:
        """``Z = [U S^(1/2); V S^(1/2)]  (modules, k + l, r_i)`` of one adapter: unique up to rotations of its columns.

        Singular values that are rounding error are dropped: their square roots would not be negligible.
        """
        u, s, v = self.adapters[index]
        return torch.cat([u, v], dim=-2) * (s * present(s)).sqrt().unsqueeze(-2)

    def magnitude(self) -> Tensor:
        """``sum_i |w_i| |Delta_i|_2``, ``(modules,)``: beside it, rounding error of the weighted sum is recognised."""
        return torch.stack([abs(w) * s.amax(-1) for w, (_, s, _) in zip(self.weights, self.adapters)]).sum(0)

    def weighted_sum(self) -> Tensor:
        """``sum_i w_i Delta_i`` in core coordinates ``(modules, k, l)``."""
        total = self.left.new_zeros(self.modules, self.left.shape[-1], self.right.shape[-1])
        for i, w in enumerate(self.weights):
            total += w * self.delta(i)
        return total


def present(s: Tensor) -> Tensor:
    """Which singular values ``(..., r)`` are more than rounding error beside the largest."""
    return (s > ROUNDING * s.amax(-1, keepdim=True)) & (s > 0)


@dataclass(frozen=True)
class Solution:
    """What a method found, in core coordinates.

    merged : the merged delta of rank ``<= R``;  spectrum : ``(modules, q)`` singular values of the merge before it
    was cut to rank R (for a mean at rank R: those of the weighted sum of the deltas);  facts : more columns of the
    report, one entry per module each (``converged``, ``iterations``, ``objective``, ``gradient_norm``, ``warnings``,
    ``fallback`` ...), as tensors ``(modules,)`` where they are numbers: those are read back from the device at once,
    and a NaN among them becomes None;  right : ``(modules, n, l')`` orthonormal, in place of ``Problem.right`` for a
    merge whose rows leave the span of the adapters' rows.
    """

    merged: LowRank
    spectrum: Tensor
    facts: dict[str, Tensor | list[Any]] = field(default_factory=dict)
    right: Tensor | None = None


def check_factors(factors: Sequence[Factors], ndim: int) -> None:
    """Raises ``ValueError`` unless ``factors`` are pairs of finite floating tensors that update one weight."""
    if len(factors) == 0:
        raise ValueError("factors: needed at least one pair (B, A); got none")
    for i, pair in enumerate(factors):
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(x, Tensor) for x in pair)):
            raise ValueError(f"factors[{i}]: needed a pair of tensors (B, A); got {type(pair).__name__}")
        _check_pair(i, pair[0], pair[1], factors[0], ndim)
    sizes = torch.stack([widen(x.detach()).square().sum() for pair in factors for x in pair])
    for j, usable in enumerate((sizes <= 1e150).tolist()):
        if not usable:
            raise ValueError(f"factors[{j // 2}]: {'BA'[j % 2]} has entries that are NaN, infinite or above 1e75")


def _check_pair(i: int, b: Tensor, a: Tensor, first: Factors, ndim: int) -> None:
    shapes = f"B {tuple(b.shape)} and A {tuple(a.shape)}"
    if b.ndim != ndim or a.ndim != ndim:
        raise ValueError(f"factors[{i}]: B and A need {ndim} dimensions; got {shapes}")
    if b.shape[-1] != a.shape[-2]:
        raise ValueError(f"factors[{i}]: the columns of B and the rows of A must agree in number; got {shapes}")
    if 0 in b.shape or 0 in a.shape:
        raise ValueError(f"factors[{i}]: no dimension may be empty; got {shapes}")
    if b.shape[:-1] != first[0].shape[:-1] or (*a.shape[:-2], a.shape[-1]) != (*b.shape[:-2], first[1].shape[-1]):
        other = f"B {tuple(first[0].shape)} and A {tuple(first[1].shape)}"
        raise ValueError(f"factors[{i}]: {shapes} do not fit factors[0], {other}: all must update one weight")
    for name, x in (("B", b), ("A", a)):
        if x.dtype not in DTYPES:
            raise ValueError(f"factors[{i}]: {name} must be float64, float32, float16 or bfloat16; got {x.dtype}")
        if x.device != first[0].device:
            raise ValueError(f"factors[{i}]: {name} is on {x.device}, but factors[0] on {first[0].device}; move one")


def reduce(factors: Sequence[Factors], weights: Sequence[float], rank: int, seeds: Sequence[int]) -> Problem:
    """The core problem of adapters given as batches ``B_i (modules, m, r_i)``, ``A_i (modules, r_i, n)``."""
    left, inner_b = _common([widen(b.detach()) for b, _ in factors])
    right, inner_a = _common([widen(a.detach()).mT for _, a in factors])
    adapters = tuple(svd_of_product(b, a.mT) for b, a in zip(inner_b, inner_a))
    return Problem(left, right, adapters, tuple(weights), rank, tuple(seeds))


def _common(columns: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """An orthonormal basis of the span of all columns, and each block's coordinates in it.

    Blocks are divided by their norms first, so that a large adapter does not hide a small one.
    """
    norms = [torch.linalg.matrix_norm(x, keepdim=True) for x in columns]
    sizes = [torch.where(n > 0, n, 1.0) for n in norms]
    q, r = torch.linalg.qr(torch.cat([x / size for x, size in zip(columns, sizes)], dim=-1))
    pieces = r.split([x.shape[-1] for x in columns], dim=-1)
    return q, [piece * size for piece, size in zip(pieces, sizes)]


def output_rank(rank: int | str, ranks: Sequence[int], rows: int, columns: int) -> int:
    """The rank R of the merge: an integer, the largest input rank ("max") or their sum ("sum").

    "max" and "sum" are cut at ``min(m, n)``.  Raises ``ValueError`` for anything else, and for an integer below 1.

    >>> output_rank("sum", [2, 3], 11, 7), output_rank("max", [2, 3], 11, 7), output_rank(1, [2, 3], 11, 7)
    (5, 3, 1)
    """
    if rank in ("max", "sum"):
        return min(max(ranks) if rank == "max" else sum(ranks), rows, columns)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f'rank must be an integer >= 1, "max" or "sum"; got {rank!r}')
    return min(rank, rows, columns)


def check_density(density: float | None) -> None:
    """Raises ``ValueError`` unless ``density`` is None or a number in (0, 1]."""
    if density is None or (isinstance(density, int | float) and not isinstance(density, bool) and 0 < density <= 1):
        return
    raise ValueError(f"density must be a number in (0, 1], the share of the entries to keep; got {density!r}")


def check_weights(weights: Sequence[float] | None, count: int, mean: bool) -> list[float]:
    """One finite number per adapter; for a mean they must be >= 0 and are normalised.  Default: ``1 / count``.

    >>> check_weights([1, 3], 2, mean=True)
    [0.25, 0.75]
    """
    if weights is None:
        return [1.0 / count] * count
    try:
        values = [float(w) for w in weights]
    except (TypeError, ValueError):
        raise ValueError(f"weights: needed a sequence of numbers; got {weights!r}") from None
    if len(values) != count:
        raise ValueError(f"weights: needed one number per adapter, {count}; got {len(values)}")
    if not all(math.isfinite(w) for w in values):
        raise ValueError(f"weights: needed finite numbers; got {values}")
    if not any(values):
        raise ValueError(f"weights: at least one must differ from zero; got {values}")
    if not mean:
        return values
    if min(values) < 0:
        raise ValueError(
            f"weights: a Fréchet mean needs numbers >= 0; got {values}.  To subtract an adapter negate it (its B), "
            'or use a method that sums, such as "tsvd"'
        )
    largest = max(values)  # divided by first: their sum could overflow
    total = sum(w / largest for w in values)
    return [w / largest / total for w in values]
