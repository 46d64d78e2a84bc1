"""Methods that look at single entries: TIES and DARE in bases that do not depend on the gauge of the factors.

Entries of a matrix mean something only in a basis.  PEFT takes the basis of the factors' own rank, which every
``(B G^-1, G A)`` changes; entries of the full ``m x n`` delta are invariant, but need it in memory.  Here the bases are
singular vectors of all adapters together, which are functions of the deltas (derived here).  They are unique up to
signs, under which every rule below is equivariant, as long as the singular values differ; where two are equal the
report warns, because the result then depends on rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifolds.low_rank import LowRank
from symgeo.merge.problem import ROUNDING, Problem, Solution, present
from symgeo.merge.sums import cut

TIES_DENSITY = 0.2  # the share of entries that TIES keeps, as in arXiv 2306.01708
DARE_DENSITY = 0.5  # the chance of an entry to survive in DARE (arXiv 2311.03099 drops up to 0.9 of them)

_TIED = 1e-6  # relative distance of two singular values below which their vectors are not told apart


def ties(problem: Problem) -> Solution:
    """TIES (arXiv 2306.01708) on the deltas ``U^T Delta_i V``, with :func:`elect` as the rule.

    ``U`` holds the left singular vectors of ``[Delta_1 .. Delta_N]`` and ``V`` the right ones of
    ``[Delta_1; ..; Delta_N]``, both as far as their singular values differ from zero.
    """
    return _ties_in(_canonical(problem, 1.0), problem)


def core(problem: Problem) -> Solution:
    """Core Space merging (arXiv 2509.17786) with TIES in the core, made independent of the gauge.

    The paper takes singular vectors of ``[B_1 .. B_N]`` and ``[A_1; ..; A_N]`` as they are stored, whose basis changes
    with the gauge although its span does not.  Here every adapter is balanced first, ``B^T B = A A^T``, which leaves
    only rotations of its columns and makes the basis that of ``sum_i (Delta_i Delta_i^T)^(1/2)`` (derived here).
    It differs from :func:`ties` in the basis alone: there ``sum_i Delta_i Delta_i^T``, in which large singular values
    count for more.
    """
    return _ties_in(_canonical(problem, 0.5), problem)


def dare(problem: Problem) -> Solution:
    """DARE (arXiv 2311.03099): ``sum_i w_i mask_i * Delta_i / density``, in the basis of :func:`ties`.

    The masks are Bernoulli(density), drawn from the module's seed on the CPU: the same on every device, and for every
    gauge.  Without a cut in the rank the mean over seeds is the weighted sum.
    """
    basis = _canonical(problem, 1.0)
    entries = _entries(problem, basis)
    density = DARE_DENSITY if problem.density is None else problem.density
    masks = torch.stack([_mask(seed, entries.shape[1:], density) for seed in problem.seeds]).to(entries.device)
    merged = (_column(problem.weights, entries) * entries * masks).sum(1) / density
    return _rotated(cut(merged, problem.rank), basis)


def knots(problem: Problem) -> Solution:
    """KnOTS with TIES (arXiv 2410.19735): ``[Delta_1 .. Delta_N] = U S [V_1^T .. V_N^T]``, ``X = U S T^T``.

    ``T = elect(V_1 .. V_N)`` entry by entry in the original n coordinates, of which every ``V_i`` has n rows and as
    many columns as there are singular values other than zero: N thin ``n x k`` matrices, never an ``m x n`` one.
    The authors' code elects among the ``S V_i^T`` instead, which trims the small singular values first.  The rows of
    ``X`` leave the span of the adapters' rows.
    """
    u, s, w = _stacked([adapter.u for adapter in problem.adapters], [adapter.s for adapter in problem.adapters])
    kept = present(s)
    blocks = w.split([adapter.s.shape[-1] for adapter in problem.adapters], dim=-2)
    columns = [adapter.v @ (block * kept.unsqueeze(-2)) for adapter, block in zip(problem.adapters, blocks)]
    size = kept.sum(-1) * problem.right.shape[-2]
    parts = torch.stack([problem.right @ x for x in columns], dim=1)
    merged = elect(parts, problem.weights, _ties_density(problem), size)
    right, inner = torch.linalg.qr(merged)
    solution = cut((u * s.unsqueeze(-2)) @ inner.mT, problem.rank)
    return Solution(solution.merged, solution.spectrum, {"warnings": _warnings([s])}, right=right)


def elect(x: Tensor, weights: Sequence[float], density: float, size: Tensor) -> Tensor:
    """TIES: trim every matrix, elect a sign for every entry, average the entries that have it.

    x : ``(modules, N, p, q)``;  size : ``(modules)``, how many of the ``p q`` entries can differ from zero.  With
    ``y_i`` the ``density * size`` entries of ``x_i`` of largest magnitude (rounded down, at least one; those of equal
    magnitude together) the result ``(modules, p, q)`` is

        ``sum_{i in S} w_i y_i / |S|``,  ``S = {i: sign(w_i y_i) = sign(sum_j w_j y_j)}``.

    The division by the number of entries, not by their weights, is that of ``disjoint_merge`` in PEFT: weights of one
    give the mean of the paper, the default ``1/N`` divides it by N once more.  Otherwise than in PEFT the weights also
    vote for the sign, so that a negative weight means the negated adapter, and a draw, where PEFT takes the positive
    side, gives zero: the rule commutes with changes of the signs of rows and columns.  Entries that are zero to
    rounding are zero.

    >>> x = torch.tensor([[[[4.0, 1.0]], [[-1.0, 3.0]]]])
    >>> elect(x, [1.0, 1.0], 1.0, torch.tensor([2]))
    tensor([[[4., 2.]]])
    """
    magnitude = x.abs().flatten(-2)
    keep = (density * size).floor().long().clamp(1, magnitude.shape[-1])
    top = magnitude.topk(int(keep.max()), dim=-1).values
    last = top.gather(-1, (keep - 1)[:, None, None].expand(-1, x.shape[1], 1))
    threshold = torch.maximum((1 - ROUNDING) * last, ROUNDING * top[..., :1])
    trimmed = _column(weights, x) * torch.where((magnitude >= threshold).unflatten(-1, x.shape[-2:]), x, 0.0)
    total = trimmed.sum(1)
    decided = torch.where(total.abs() > ROUNDING * trimmed.abs().sum(1), total, 0.0).sign()
    agreeing = (trimmed.sign() == decided.unsqueeze(1)) & (trimmed != 0)
    return (trimmed * agreeing).sum(1) / agreeing.sum(1).clamp_min(1)


class _Basis(NamedTuple):
    """Orthonormal ``left (modules, k, k)``, ``right (modules, l, l)``, and what is known of the entries in them.

    size : ``(modules)``, how many entries can differ from zero;  warnings : per module.
    """

    left: Tensor
    right: Tensor
    size: Tensor
    warnings: list[Any]


def _canonical(problem: Problem, power: float) -> _Basis:
    """Eigenvectors of ``sum_i (Delta_i Delta_i^T)^power`` and ``sum_i (Delta_i^T Delta_i)^power``, descending."""
    values = [torch.where(present(adapter.s), adapter.s, 0.0).pow(power) for adapter in problem.adapters]
    left, s, _ = _stacked([adapter.u for adapter in problem.adapters], values)
    right, t, _ = _stacked([adapter.v for adapter in problem.adapters], values)
    return _Basis(left, right, present(s).sum(-1) * present(t).sum(-1), _warnings([s, t]))


def _ties_in(basis: _Basis, problem: Problem) -> Solution:
    merged = elect(_entries(problem, basis), problem.weights, _ties_density(problem), basis.size)
    return _rotated(cut(merged, problem.rank), basis)


def _stacked(vectors: Sequence[Tensor], values: Sequence[Tensor]) -> LowRank:
    """The singular value decomposition of ``[U_1 diag(s_1) .. U_N diag(s_N)]``."""
    columns = torch.cat([u * s.unsqueeze(-2) for u, s in zip(vectors, values)], dim=-1)
    u, s, vh = torch.linalg.svd(columns, full_matrices=False)
    return LowRank(u, s, vh.mT)


def _entries(problem: Problem, basis: _Basis) -> Tensor:
    """``U^T Delta_i V`` of all adapters, ``(modules, N, k, l)``."""
    left, right, _, _ = basis
    return torch.stack([(left.mT @ u * s.unsqueeze(-2)) @ (v.mT @ right) for u, s, v in problem.adapters], dim=1)


def _rotated(solution: Solution, basis: _Basis) -> Solution:
    """The solution, found in the canonical basis, in core coordinates."""
    u, s, v = solution.merged
    merged = LowRank(basis.left @ u, s, basis.right @ v)
    return Solution(merged, solution.spectrum, {"warnings": basis.warnings})


def _mask(seed: int, shape: Sequence[int], density: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tuple(shape), dtype=torch.float32, generator=generator) < density


def _column(weights: Sequence[float], x: Tensor) -> Tensor:
    """The weights as ``(N, 1, 1)``, beside ``(modules, N, p, q)``."""
    return torch.tensor(weights, dtype=x.dtype, device=x.device)[:, None, None]


def _ties_density(problem: Problem) -> float:
    return TIES_DENSITY if problem.density is None else problem.density


def _warnings(spectra: Sequence[Tensor]) -> list[Any]:
    """Per module, a list with one sentence if two singular values that are not zero are equal."""
    tied = torch.zeros(spectra[0].shape[:-1], dtype=torch.bool, device=spectra[0].device)
    for s in spectra:
        tied |= (present(s[..., 1:]) & (s[..., :-1] - s[..., 1:] <= _TIED * s[..., :1])).any(-1)
    note = (
        "the adapters have equal singular values together, so that the basis in which entries are compared "
        "is not unique: the result depends on rounding"
    )
    return [[note] if bool(flag) else [] for flag in tied.cpu()]
