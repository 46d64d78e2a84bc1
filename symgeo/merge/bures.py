"""The mean of balanced factors: Fréchet mean of adapters in the Bures-Wasserstein geometry (derived here).

An adapter ``Delta = U S V^T`` is the point ``Z = [U S^(1/2); V S^(1/2)]``, unique up to rotations of its columns, as
in :class:`manifolds.BuresWasserstein`; here points may lack rank, be zero, and differ in their number of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manifolds.linalg import gram
from manifolds.low_rank import svd_of_product
from symgeo.merge.problem import Problem, Solution
from symgeo.merge.sums import cut

STOP = 1e-12  # of |gradient|, relative to the root mean square of |Z_i|
CONVERGED = 1e-9  # the same, for a mean to count as converged when the iterations are used up
MAX_ITERATIONS = 3000  # tens are enough unless adapters are nearly orthogonal
_MEMORY = 10  # differences kept by Anderson's method


def bures(problem: Problem) -> Solution:
    """``argmin_Z sum_i w_i min_Q |Z_i Q - Z|_F^2`` over ``Z = [B; A^T]`` with R columns; the merge is ``B A``.

    The squared distance is ``d_i^2 = |Z_i|^2 + |Z|^2 - 2 |Z_i^T Z|_*``; for inputs and a mean that are balanced,
    ``2 |D_1|_* + 2 |D_2|_* - 2 |B_1^T B_2 + A_1 A_2^T|_*``.  The mean need not be balanced.  Adapters may have
    different ranks, R may be anything up to their sum (the mean may need fewer columns), and zero adapters are points
    like others.

    Starts at the truncated weighted sum of the deltas and iterates ``Z <- sum_i w_i Z_i Q_i`` with ``Q_i`` the polar
    factor of ``Z_i^T Z``, a partial isometry ``r_i x R``, which never increases the objective; accelerated by
    Anderson's method, whose proposals are taken only where the objective does not grow.  Where ``Z_i^T Z`` lacks rank
    several ``Q_i`` are optimal and any one of them is taken: the mean is then one of several, and the report warns.
    """
    kept = [i for i, w in enumerate(problem.weights) if w > 0]
    width = max(problem.adapters[i].s.shape[-1] for i in kept)
    points = torch.cat([_widened(problem.balanced(i), width) for i in kept], dim=-1)
    weights = torch.tensor([problem.weights[i] for i in kept], dtype=points.dtype, device=points.device)
    start = cut(problem.weighted_sum(), problem.rank)
    z = torch.cat([start.merged.u, start.merged.v], dim=-2) * start.merged.s.sqrt().unsqueeze(-2)
    z = _widened(z, min(problem.rank, points.shape[-1]))
    found = _search(gram(points), points.mT @ z, weights)
    mean = points @ (found.coefficients * weights.repeat_interleave(width).unsqueeze(-1))
    k = problem.left.shape[-1]
    facts: dict[str, Tensor | list[object]] = {
        "converged": found.gradient <= CONVERGED * found.size, "iterations": found.iterations,
        "objective": found.objective, "gradient_norm": found.gradient,
    }  # fmt: skip
    return Solution(svd_of_product(mean[..., :k, :], mean[..., k:, :].mT), start.spectrum, facts)


def _widened(z: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(z, (0, columns - z.shape[-1]))


class _Mean(NamedTuple):
    """``Z = sum_i w_i Z_i C_i``, with all ``C_i`` stacked ``(modules, N r, R)``, and what is known about it."""

    coefficients: Tensor
    objective: Tensor
    gradient: Tensor
    size: Tensor
    iterations: Tensor


class _State(NamedTuple):
    """Coefficients ``C``, their Procrustes step ``W - C``, objective and norm of the gradient, per module."""

    c: Tensor
    step: Tensor
    objective: Tensor
    gradient: Tensor

    def pick(self, mask: Tensor, other: _State) -> _State:
        """``other`` where ``mask`` holds."""
        return _State(*(torch.where(mask[(..., *(None,) * (a.ndim - 1))], b, a) for a, b in zip(self, other)))


class _Procrustes:
    """The objective and the step at ``Z = sum_i w_i Z_i C_i``; only the Gram matrix of all points is needed."""

    def __init__(self, products: Tensor, weights: Tensor):
        self.products, self.weights = products, weights
        self.column = weights.repeat_interleave(products.shape[-1] // len(weights)).unsqueeze(-1)
        self.energy = (products.diagonal(dim1=-2, dim2=-1) * self.column.squeeze(-1)).sum(-1)  # sum_i w_i |Z_i|^2

    def polar(self, crossed: Tensor) -> tuple[Tensor, Tensor]:
        """The polar factors of all ``Z_i^T Z``, stacked, and ``sum_i w_i |Z_i^T Z|_*``."""
        blocks = crossed.unflatten(-2, (len(self.weights), -1))
        u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
        return (u @ vh).flatten(-3, -2), (s.sum(-1) * self.weights).sum(-1)

    def state(self, c: Tensor) -> _State:
        """Everything about the coefficients ``c``."""
        crossed = self.products @ (self.column * c)
        target, nuclear = self.polar(crossed)
        objective = self.energy + (self.column * c * crossed).sum((-2, -1)) - 2 * nuclear
        step = target - c
        return _State(c, step, objective.clamp_min(0), self.inner(step, step).clamp_min(0).sqrt())

    def inner(self, c: Tensor, d: Tensor) -> Tensor:
        """``<sum_i w_i Z_i C_i, sum_i w_i Z_i D_i>``."""
        return (self.column * c * (self.products @ (self.column * d))).sum((-2, -1))


def _search(products: Tensor, crossed: Tensor, weights: Tensor) -> _Mean:
    """Minimises from the point whose products with all others are ``crossed (modules, N r, R)``.

    Modules that have finished stand still, and leave the batch when they are half of it.
    """
    size = products.diagonal(dim1=-2, dim2=-1).sum(-1)
    unit = torch.where(size > 0, size, 1.0)[..., None, None]
    problem = _Procrustes(products / unit, weights)
    state = problem.state(problem.polar(crossed)[0])
    scale = problem.energy.sqrt()
    iterations = torch.zeros_like(scale, dtype=torch.int64)
    everything, rows = state, torch.arange(len(scale), device=scale.device)
    history, rejected = _History(), torch.zeros_like(scale, dtype=torch.bool)
    for _ in range(MAX_ITERATIONS):
        active = state.gradient > STOP * scale[rows]
        running = int(active.sum())
        if 2 * running <= len(active):
            everything = _State(*(a.index_copy(0, rows, b) for a, b in zip(everything, state)))
            if running == 0:
                break
            rows, rejected = rows[active], rejected[active]
            state, problem = _State(*(a[active] for a in state)), _Procrustes(problem.products[active], weights)
            history.keep(active)
            active = active[active]
        iterations[rows] += active
        move = torch.where(rejected[..., None, None], state.step, history.accelerate(problem, state))
        proposal = problem.state(state.c + move)
        better = rejected | (proposal.objective <= state.objective * (1 + 1e-14))
        rejected = active & ~better
        state = state.pick(active & better, proposal)
    else:
        everything = _State(*(a.index_copy(0, rows, b) for a, b in zip(everything, state)))
    root = unit[..., 0, 0].sqrt()
    return _Mean(everything.c, everything.objective * root**2, everything.gradient * root, scale * root, iterations)


class _History:
    """Anderson's method: the move that cancels the steps in the span of their last differences."""

    def __init__(self) -> None:
        self.states: list[_State] = []

    def keep(self, mask: Tensor) -> None:
        """Forgets the modules outside ``mask``."""
        self.states = [_State(*(a[mask] for a in state)) for state in self.states]

    def accelerate(self, problem: _Procrustes, state: _State) -> Tensor:
        """``W - C - sum_j (dC_j + dStep_j) x_j`` with ``x = argmin |step - sum_j dStep_j x_j|``."""
        move = state.step
        if self.states:
            d_step = torch.stack([old.step - state.step for old in self.states])  # (differences, modules, N r, R)
            d_move = torch.stack([old.c - state.c for old in self.states]) + d_step
            image = problem.column * (problem.products @ (problem.column * d_step))
            normal = torch.einsum("amij,bmij->mab", image, d_step)
            size = normal.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
            scale = torch.where(size > 0, 1 / size, 0.0)
            damping = 1e-10 * torch.eye(size.shape[-1], dtype=size.dtype, device=size.device)
            right = torch.einsum("amij,mij->ma", image, state.step) * scale
            solved = torch.linalg.solve(normal * scale.unsqueeze(-1) * scale.unsqueeze(-2) + damping, right)
            move = move - torch.einsum("ma,amij->mij", solved * scale, d_move)
        self.states = [*self.states, state][-_MEMORY:]
        return move
