"""The Kullback-Leibler divergence of a pair: each side sees the gradient whitened by the other one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from symgeo.functional import Params
from symgeo.optim.averaged import Averaged
from symgeo.optim.storage import Stack, State


def kl_step(
    first: Averaged, second: Averaged, state: State, gradient: Mapping[str, Tensor], due: bool, started: bool
) -> Params:
    r"""Take one gradient into the statistics of both sides, renew the operators if due, and apply them.

        A <- EMA(G B^-1 G^T / n),   B <- EMA(G^T A^-1 G / m)      (arXiv 2509.03378)

    with the other side's operator of before; its fixed point minimises the divergence from N(0, E[g g^T]) to
    N(0, A (x) B).  At the first step the first side sees the gradient as it is, and the second one what the first
    side then whitens; `started` tells whether there were others before.
    """
    by_first = applied(first, state, gradient) if started else gradient
    xs = first.space.encode(applied(second, state, gradient) if started else gradient)
    first.update(state, xs, None)
    if due:
        first.refresh(state, xs, None)
        by_first = by_first if started else applied(first, state, gradient)
    ys = second.space.encode(by_first)
    second.update(state, ys, None)
    if not due:
        return applied(second, state, by_first)
    second.refresh(state, ys, None)
    _share_scale(first, second, state)
    return applied(second, state, applied(first, state, gradient))


def applied(side: Averaged, state: State, tensors: Mapping[str, Tensor]) -> Params:
    """The operator of one side on tensors."""
    return side.space.decode(side.apply(state, side.space.encode(tensors)))


def _share_scale(first: Averaged, second: Averaged, state: State) -> None:
    """Replace (A, B) by (A / c, c B) with equal mean eigenvalues, matrix by matrix.

    Nothing depends on c, and damping lets it drift without end.
    """
    if not first.space.buckets:
        return
    sizes = [torch.cat([_means(stack.read(state)) for stack in side.averages["gradient"]])[side.alphabetical]
             for side in (first, second)]
    usable = (sizes[0] > 0) & (sizes[1] > 0)
    c = torch.where(usable, sizes[0] / torch.where(usable, sizes[1], 1.0), 1.0).sqrt()
    for side, factor in ((first, 1 / c), (second, c)):
        factors = torch.empty_like(factor)
        factors[side.alphabetical] = factor
        parts = factors.split([len(bucket.kinds) for bucket in side.space.buckets])
        for part, average, root in zip(parts, side.averages["gradient"], side.stored):
            _scale(average, state, part)
            _scale(root, state, part.rsqrt())


def _scale(stack: Stack, state: State, factors: Tensor) -> None:
    t = stack.stored(state)
    t.mul_(factors.reshape(-1, *(1 for _ in t.shape[1:])).to(t.dtype))


def _means(t: Tensor) -> Tensor:
    """The mean eigenvalue of each kind, (K,), of matrices or diagonals with one batch entry."""
    values = t if t.dim() == 3 else t.diagonal(dim1=-2, dim2=-1)
    return values.flatten(1).mean(-1)
