"""Grafting: the direction of one optimizer at the length of another one's step, parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GRAFTS = ("sgd", "adam")


def grafted(steps: Sequence[Tensor], lengths: Sequence[Tensor]) -> list[Tensor]:
    r"""Every step scaled to the norm of another one, ``u |a| / |u|`` (arXiv 2002.11803); zero steps stay zero.

    >>> grafted([torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 0.0])])
    [tensor([0.6000, 0.8000])]
    """
    if not steps:
        return []
    wanted, found = (torch.stack(torch._foreach_norm(list(x))) for x in (lengths, steps))
    ratio = torch.where(found > 0, wanted / torch.where(found > 0, found, 1.0), 0.0)
    return list(torch._foreach_mul(list(steps), list(ratio.unbind())))


def adam_steps(means: Sequence[Tensor], squares: Sequence[Tensor], eps: float = 1e-8) -> list[Tensor]:
    """m / (sqrt(v) + eps) for debiased averages."""
    if not means:
        return []
    roots = torch._foreach_sqrt(list(squares))
    torch._foreach_add_(roots, eps)
    return list(torch._foreach_div(list(means), roots))
