"""AdamW for parameters without a declared symmetry, over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from symgeo.distributed import local

EPS = 1e-8

#: a learning rate
Rate = float | Tensor


def adamw_(
    params: Sequence[Tensor], states: Sequence[dict[str, Any]], lr: Rate, betas: tuple[float, float],
    weight_decay: float,
) -> None:
    r"""One step on every parameter that has a gradient; the others are skipped.

    ``w <- (1 - lr wd) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + 1e-8)``  (arXiv 1711.05101)

    The states get ``exp_avg`` m, ``exp_avg_sq`` v, at least in single precision, and ``step`` t.  Of sharded parameters
    (and states) every process steps its own part.
    """
    moved = [(p, state) for p, state in zip(params, states) if p.grad is not None]
    if not moved:
        return
    for p, state in moved:
        if "exp_avg" not in state:
            state |= {"step": 0, "exp_avg": zeros(p), "exp_avg_sq": zeros(p)}
        state["step"] += 1
    steps = [state["step"] for _, state in moved]
    means, squares = ([local(state[key]) for _, state in moved] for key in ("exp_avg", "exp_avg_sq"))
    grads = [local(p.grad).to(m.dtype) for (p, _), m in zip(moved, means) if p.grad is not None]
    torch._foreach_lerp_(means, grads, 1 - betas[0])
    moment_(squares, grads, betas[1])
    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, [(1 - betas[1] ** t) ** 0.5 for t in steps])
    torch._foreach_add_(roots, EPS)
    updates = torch._foreach_div(means, roots)
    torch._foreach_div_(updates, [1 - betas[0] ** t for t in steps])
    descend_([local(p) for p, _ in moved], updates, lr, weight_decay)


def zeros(p: Tensor) -> Tensor:
    """Zeros like p, sharded if p is, at least in single precision."""
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))


def full_precision(p: Tensor) -> Tensor:
    """Zeros of the whole shape of p, at least in single precision."""
    return torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=local(p).device)


def moment_(squares: list[Tensor], grads: list[Tensor], decay: float) -> None:
    """v <- decay v + (1 - decay) g^2, in place."""
    torch._foreach_mul_(squares, decay)
    torch._foreach_addcmul_(squares, grads, grads, 1 - decay)


def descend_(params: list[Tensor], updates: Sequence[Tensor], lr: Rate, weight_decay: float) -> None:
    """w <- (1 - lr wd) w - lr u, in place; lr may be a tensor, which is not read."""
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(list(updates), lr))
    else:
        torch._foreach_add_(params, list(updates), alpha=-lr)
