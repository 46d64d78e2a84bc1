"""Statistics without roots: a factor K of the inverse second moment, moved along its matrix group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from symgeo.curvature.spectrum import largest_of
from symgeo.optim.options import Options
from symgeo.optim.roots import group_update
from symgeo.optim.space import Space
from symgeo.optim.statistics import applied, second_moment
from symgeo.optim.storage import State

Coordinates = Sequence[Tensor]


class RootFree:
    r"""``H^-1 = K K^H`` with ``K <- K (I - (1 - b2) m / max(1, |m|))``, see `symgeo.optim.roots.group_update`.

    The second moment is that of the step alone; the rate 1 - b2 averages.  The damping is relative to the largest
    Frobenius norm of the blocks of the step.  Nothing is inverted and no eigenvalue is computed.
    """

    def __init__(self, space: Space, options: Options) -> None:
        self.space, self._options = space, options
        self._factors = space.stacks("factor")

    def ready(self, state: State) -> bool:
        """Whether there is an operator from an earlier step."""
        return all(steps > 0 for stack in self._factors for steps in stack.steps(state))

    def update(self, state: State, xs: Coordinates, ws: Coordinates | None) -> None:
        """Move the factors towards the second moment of one step's gradient x."""
        moments = [second_moment(bucket, x, None, diagonal)
                   for bucket, x, diagonal in zip(self.space.buckets, xs, self.space.diagonal)]
        sizes = [t.abs().amax() if diagonal else _norm(t) for t, diagonal in zip(moments, self.space.diagonal)]
        damping = self._options.damping * largest_of(sizes, self._options.damping)
        for i, (bucket, stack, t) in enumerate(zip(self.space.buckets, self._factors, moments)):
            if bucket.trivial and self._options.trivial == "drop":
                continue
            rate = 1 - self.space.decay(i)
            stack.write(state, group_update(stack.read(state), t, rate, damping, self.space.diagonal[i]))
            stack.count(state)

    def refresh(self, state: State, xs: Coordinates, ws: Coordinates | None) -> None:
        """Nothing to do."""

    def apply(self, state: State, xs: Coordinates) -> list[Tensor]:
        """K K^H in coordinates."""
        result = []
        for stack, x, diagonal in zip(self._factors, xs, self.space.diagonal):
            k = stack.read(state)
            result.append(applied(k.square(), x, True) if diagonal else k @ (k.mH @ x))
        return result


def _norm(t: Tensor) -> Tensor:
    """The largest Frobenius norm of matrices; none of their squares overflows."""
    largest = t.abs().amax()
    return largest * torch.linalg.matrix_norm(t / torch.where(largest > 0, largest, 1.0)).amax()
