"""Statistics averaged over time, and the inverse powers made of them every few steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from symgeo.curvature import DenseBlock, InvariantOperator, Moments, hessian, trivial_block
from symgeo.curvature.structured import Block
from symgeo.optim.options import Options
from symgeo.optim.roots import inverse_power, matmul_polar, matmul_powers
from symgeo.optim.space import Space
from symgeo.optim.statistics import (
    applied,
    as_block,
    as_matrix_block,
    as_tensor,
    average_,
    debiased,
    second_moment,
)
from symgeo.optim.storage import State

#: the statistics that each estimator averages over time
AVERAGED = {"gradient": ("gradient",), "riccati": ("gradient",), "secant": ("gradient", "weight", "mixed")}

Coordinates = Sequence[Tensor]


class Averaged:
    r"""T <- b2 T + (1 - b2) X Y^H / d for every kind, and the operator that an estimator makes of T / (1 - b2^t).

    The statistics "gradient" (of the gradient x), "weight" (of the weights w) and "mixed" (of both) are entries of
    the optimizer's state, and so are the operators ("root") where they outlive a step.  With b2 = 0 nothing is kept.
    """

    def __init__(self, space: Space, options: Options) -> None:
        self.space, self._options = space, options
        self.averages = {
            what: space.stacks(what) if what == "mixed" else [stack.hermitian() for stack in space.stacks(what)]
            for what in AVERAGED[options.estimator]
        }
        self.stored = [stack.hermitian() for stack in space.stacks("root")]
        self._roots: list[Tensor] = []
        self._method = options.method(space.decomposition.device)
        self._keeps = options.update_every > 1 or (options.divergence == "kl" and options.sides == 2)

    def ready(self, state: State) -> bool:
        """Whether there is an operator from an earlier step."""
        return self._keeps and all(steps > 0 for stack in self.stored for steps in stack.steps(state))

    def update(self, state: State, xs: Coordinates, ws: Coordinates | None) -> None:
        """One step's gradient x and weights w into the averages."""
        for what, stacks in self.averages.items():
            for i, (bucket, stack) in enumerate(zip(self.space.buckets, stacks)):
                if self._skipped(i, what) or self._forgets(i):
                    continue
                x, y = _pair(what, i, xs, ws)
                average_(stack.stored(state), bucket, x, y, self.space.decay(i), self.space.diagonal[i])
                stack.count(state)

    def refresh(self, state: State, xs: Coordinates, ws: Coordinates | None) -> None:
        """The operator from the averages, and from this step's coordinates where those are all there is."""
        if self._is_polar:
            return
        gradient = self._options.estimator == "gradient"
        blocks = self._power(state, xs) if gradient else self._hessian(state, xs, ws)
        roots = [as_tensor(bucket, block, diagonal, self.space.dtype)
                 for bucket, block, diagonal in zip(self.space.buckets, blocks, self.space.diagonal)]
        if not self._keeps:
            self._roots = roots
            return
        for stack, root in zip(self.stored, roots):
            stack.write(state, root)
            stack.count(state)

    def apply(self, state: State, xs: Coordinates) -> list[Tensor]:
        """H^-1 in coordinates."""
        if self._is_polar:
            return [matmul_polar(bucket, x) for bucket, x in zip(self.space.buckets, xs)]
        roots = [stack.read(state) for stack in self.stored] if self._keeps else self._roots
        return [applied(root, x, diagonal) for root, x, diagonal in zip(roots, xs, self.space.diagonal)]

    @cached_property
    def alphabetical(self) -> Tensor:
        """The numbers of all kinds in the alphabetical order of the parameters that they belong to."""
        names = [rows[0][0] for bucket in self.space.buckets for rows in bucket.rows]
        return torch.tensor(sorted(range(len(names)), key=names.__getitem__), device=self.space.decomposition.device)

    @property
    def _is_polar(self) -> bool:
        """Whether the operator is that of one gradient, by matrix products: sqrt(d) times the polar factor."""
        o, buckets = self._options, self.space.buckets
        asked = self._method == "newton" and o.sides == 1 and o.power == 0.5 and o.damping == 0 and not self._keeps
        able = not any(self.space.diagonal) and not any(bucket.complex for bucket in buckets)
        return asked and able and all(self._forgets(i) for i in range(len(buckets)))

    def _forgets(self, i: int) -> bool:
        """Whether b2 = 0 for all of bucket i."""
        decay = self.space.decay(i)
        return isinstance(decay, float) and decay == 0.0

    def _skipped(self, i: int, what: str) -> bool:
        """The trivial kind is that of the gradient, and none with the policy "drop"."""
        return self.space.buckets[i].trivial and (what != "gradient" or self._options.trivial == "drop")

    def _moment(self, state: State, what: str, i: int, xs: Coordinates, ws: Coordinates | None) -> Tensor:
        """The debiased average, or the moment of this step."""
        if what in self.averages and not self._forgets(i):
            stack = self.averages[what][i]
            return debiased(stack.read(state), self.space.decay(i), self.space.per_kind(i, stack.steps(state)))
        return second_moment(self.space.buckets[i], *_pair(what, i, xs, ws), self.space.diagonal[i])

    def _power(self, state: State, xs: Coordinates) -> list[Block]:
        """S_g^-power"""
        o = self._options
        blocks: list[Block] = []
        for i, (bucket, x, diagonal) in enumerate(zip(self.space.buckets, xs, self.space.diagonal)):
            if self._skipped(i, "gradient"):
                blocks.append(trivial_block("drop", x.flatten()))
            elif self._method == "eigh" and o.damping == 0 and not diagonal and self._forgets(i):
                blocks.append(DenseBlock.outer(x / bucket.dimension**0.5))  # singular values: no Gram is rounded
            else:
                blocks.append(as_block(self._moment(state, "gradient", i, xs, None), diagonal))
        if self._method == "newton":
            return matmul_powers(blocks, o.side_power, o.damping)
        return inverse_power(blocks, o.side_power, o.damping, torch.finfo(self.space.dtype).eps)

    def _hessian(self, state: State, xs: Coordinates, ws: Coordinates | None) -> list[Block]:
        """The inverse of the estimator's Hessian."""
        gradient, weight, mixed = (self._operator(state, what, xs, ws) for what in ("gradient", "weight", "mixed"))
        moments = Moments(gradient, weight, mixed)
        return list(hessian(self._options.estimator, moments, self._options.damping, inverse=True).blocks)

    def _operator(self, state: State, what: str, xs: Coordinates, ws: Coordinates | None) -> InvariantOperator:
        blocks: list[Block] = []
        for i, (bucket, x, diagonal) in enumerate(zip(self.space.buckets, xs, self.space.diagonal)):
            if self._skipped(i, what):
                blocks.append(trivial_block("drop", x.flatten()))
            else:
                blocks.append(as_matrix_block(bucket, self._moment(state, what, i, xs, ws), diagonal, what != "mixed"))
        return InvariantOperator(self.space.decomposition, blocks)


def _pair(what: str, i: int, xs: Coordinates, ws: Coordinates | None) -> tuple[Tensor, Tensor | None]:
    """The vectors whose second moment is meant, of bucket i."""
    if what == "gradient" or ws is None:
        return xs[i], None
    return (ws[i], None) if what == "weight" else (xs[i], ws[i])
