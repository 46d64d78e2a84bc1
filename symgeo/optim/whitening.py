"""The statistics of one or two symmetries together: averages, refreshes, and the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from symgeo.functional import Params
from symgeo.optim.averaged import Averaged
from symgeo.optim.kl import kl_step
from symgeo.optim.rootfree import RootFree
from symgeo.optim.storage import State

Side = Averaged | RootFree


def whitened_step(
    sides: Sequence[Side], state: State, gradient: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None,
    due: bool, ready: bool, divergence: str,
) -> Params:
    """Take one gradient into the statistics, renew the operators if due, and apply them one after the other.

    ready: whether there are operators from an earlier step.  For the divergence "kl" of a pair see
    `symgeo.optim.kl`; with "frobenius" every side sees the gradient itself.
    """
    first, last = sides[0], sides[-1]
    if divergence == "kl" and first is not last and isinstance(first, Averaged) and isinstance(last, Averaged):
        return kl_step(first, last, state, gradient, due, ready)
    seen = [side.space.encode(gradient) for side in sides]
    for side, xs in zip(sides, seen):
        ws = None if weights is None else side.space.encode(weights)
        side.update(state, xs, ws)
        if due:
            side.refresh(state, xs, ws)
    step = sides[0].space.decode(sides[0].apply(state, seen[0]))
    for side in sides[1:]:
        step = side.space.decode(side.apply(state, side.space.encode(step)))
    return step
