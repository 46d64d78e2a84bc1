"""Statistics of one symmetry as the basis of their eigenvectors, kept from one renewal to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from manifolds.linalg import eigh, widen
from symgeo.functional import Params
from symgeo.optim.averaged import Averaged, Coordinates
from symgeo.optim.options import Options
from symgeo.optim.space import Space
from symgeo.optim.statistics import Factor, debiased, on_device
from symgeo.optim.storage import State

#: up to this size eigenvectors are computed in double precision whatever that of the matrix
_SMALL = 64

#: eigenvalues below this times eps M times the largest of their matrix are rounding errors
_SLACK = 4.0


class Eigenbasis(Averaged):
    r"""The eigenvectors Q, in ascending order of eigenvalues, of the statistics T of every kind.

    T <- b2 T + (1 - b2) X X^H / d at every step; `refresh` renews Q.  A kind that has no Q yet has Q = 0, and one
    with a single copy, and a diagonal trivial kind, Q = 1.  ``rank`` marks the copies that count (B, M): 1 for those
    whose eigenvalue is not zero, 0 for the null space of T, in which the choice of eigenvectors is arbitrary.
    """

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        self.copies = copy(space)
        self.copies.diagonal = [True] * len(space.buckets)
        self._bases = space.stacks("basis")
        self._ranks = self.copies.stacks("rank")

    def ready(self, state: State) -> bool:
        """Whether there is a basis from an earlier step."""
        return all(steps > 0 for stack in self._bases for steps in stack.steps(state))

    def refresh(self, state: State, xs: Coordinates, ws: Coordinates | None) -> None:
        """Renew the eigenvectors."""
        for i, diagonal in enumerate(self.space.diagonal):
            if not diagonal:
                t = self._moment(state, "gradient", i, xs, None)
                values, vectors = eigh(widen(t) if t.shape[-1] <= _SMALL else t)
                limit = _SLACK * torch.finfo(self.space.dtype).eps * t.shape[-1] * values.abs().amax(-1, keepdim=True)
                self._bases[i].write(state, vectors)
                self._ranks[i].write(state, (values > limit).to(self.space.dtype))
            self._bases[i].count(state)

    def rotate(self, state: State, xs: Coordinates) -> list[Tensor]:
        """Q^H X"""
        return [x if diagonal else stack.read(state).mH @ x
                for stack, x, diagonal in zip(self._bases, xs, self.space.diagonal)]

    def back(self, state: State, ys: Coordinates) -> list[Tensor]:
        """Q Y"""
        return [y if diagonal else stack.read(state) @ y
                for stack, y, diagonal in zip(self._bases, ys, self.space.diagonal)]

    def energies(self, state: State, ys: Coordinates) -> list[Tensor]:
        """The mean square of every copy of Y, (K, B, M), in the null space of T that of all its copies."""
        result = []
        for stack, y, diagonal in zip(self._ranks, ys, self.space.diagonal):
            energy = y.abs().square().mean(-1)
            if not diagonal:
                rank = stack.read(state)
                null = 1 - rank
                shared = (null * energy).sum(-1, keepdim=True) / null.sum(-1, keepdim=True).clamp_min(1.0)
                energy = rank * energy + null * shared
            result.append(energy)
        return result

    def seen(self, state: State, i: int) -> list[int]:
        """How many gradients the statistics of the kinds of bucket i have seen."""
        return self.averages["gradient"][i].steps(state)

    def drops(self, i: int) -> bool:
        """Whether bucket i is left where it is."""
        return self._skipped(i, "gradient")

    def whitened(self, state: State, xs: Coordinates) -> list[Tensor]:
        r"""``D^(-1/2) Q^T X`` with ``D = (1 - b2^t) diag(Q^T T Q) / mean + b2^t``: an average that began with 1.

        The mean eigenvalue is 1, so that the scale of T does not matter.  Entries of D are at least ``M^-2`` and the
        damping.  A kind that has no Q yet comes back as it is.
        """
        result = []
        for i, (stack, x, diagonal) in enumerate(zip(self._bases, xs, self.space.diagonal)):
            steps = self.seen(state, i)
            if diagonal or not any(steps):
                result.append(x)
                continue
            q, t = stack.read(state), self._moment(state, "gradient", i, xs, None)
            values = (q.conj() * (t @ q)).sum(-2).real
            d = self._scaled(values, self.copies.decay(i), self.copies.per_kind(i, steps)).unsqueeze(-1)
            y = d.rsqrt() * (q.mH @ x)
            result.append(y if all(steps) else _where_seen(steps, y, x))
        return result

    def _scaled(self, values: Tensor, decay: Factor, steps: Factor) -> Tensor:
        mean = values.mean(-1, keepdim=True)
        relative = torch.where(mean > 0, values / torch.where(mean > 0, mean, 1.0), 1.0)
        size = values.shape[-1]
        return relative.lerp(torch.ones_like(relative), _as_weight(decay**steps, relative)).clamp_min(
            max(self._options.damping, size**-2))


def _as_weight(weight: Factor, like: Tensor) -> Factor:
    return weight if isinstance(weight, float) else weight.to(like.dtype).expand_as(like)


def _where_seen(steps: Sequence[int], y: Tensor, x: Tensor) -> Tensor:
    seen = on_device([float(count > 0) for count in steps], y.real).reshape(-1, 1, 1, 1)
    return torch.where(seen > 0, y, x)


def debiased_copies(side: Eigenbasis, state: State, i: int, v: Tensor) -> Tensor:
    """V / (1 - b2^t), t the number of gradients in V: without the first one where that had no basis yet."""
    steps = [count + 1 if side.space.diagonal[i] else max(1, count) for count in side.seen(state, i)]
    return debiased(v, side.copies.decay(i), side.copies.per_kind(i, steps))


def moved(
    side: Eigenbasis, how: Callable[[State, Coordinates], list[Tensor]], state: State, tensors: Mapping[str, Tensor]
) -> Params:
    """A map of coordinates (`rotate`, `back` or `whitened` of the side) on tensors."""
    return side.space.decode(how(state, side.space.encode(tensors)))
