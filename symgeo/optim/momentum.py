"""Averages of gradients and of their squares: found for a step first, and kept once the step has succeeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from symgeo.optim.adamw import full_precision, moment_

Named = Sequence[tuple[str, Tensor]]
State = Mapping[Tensor, dict[str, Any]]

#: the entries that `keep` changes
MOMENTS = ("exp_avg", "exp_avg_sq")


def means(
    named: Named, state: State, grads: Mapping[str, Tensor], beta: float, nesterov: bool
) -> dict[str, Tensor]:
    """``m / (1 - b1^t)`` with one more gradient, of every parameter by name; the state stays as it is."""
    if not named:
        return {}
    averages = [_moment(state, p, "exp_avg") for _, p in named]
    seen = _gradients(named, grads, averages)
    averages = list(torch._foreach_lerp(averages, seen, 1 - beta))
    if nesterov:
        torch._foreach_lerp_(averages, seen, 1 - beta)
    torch._foreach_div_(averages, [1 - beta ** (steps_after(state, p) + nesterov) for _, p in named])
    return {name: m for (name, _), m in zip(named, averages)}


def squares(named: Named, state: State, grads: Mapping[str, Tensor], beta: float) -> list[Tensor]:
    """``v / (1 - b2^t)`` with the square of one more gradient; the state stays as it is."""
    if not named:
        return []
    old = [_moment(state, p, "exp_avg_sq") for _, p in named]
    found = list(torch._foreach_mul(old, beta))
    seen = _gradients(named, grads, old)
    torch._foreach_addcmul_(found, seen, seen, 1 - beta)
    torch._foreach_div_(found, [1 - beta ** steps_after(state, p) for _, p in named])
    return found


def keep(named: Named, state: State, grads: Mapping[str, Tensor], betas: tuple[float, float], second: bool) -> None:
    """Take the gradients into ``exp_avg``, and their squares into ``exp_avg_sq`` if that is wanted."""
    if not named:
        return
    for _, p in named:
        for key in MOMENTS[: 1 + second]:
            state[p].setdefault(key, _moment(state, p, key))
    averages = [state[p]["exp_avg"] for _, p in named]
    seen = _gradients(named, grads, averages)
    torch._foreach_lerp_(averages, seen, 1 - betas[0])
    if second:
        moment_([state[p]["exp_avg_sq"] for _, p in named], seen, betas[1])


def steps_after(state: State, p: Tensor) -> int:
    """The number of the step that is being taken."""
    return int(state[p].get("step", 0)) + 1


def _moment(state: State, p: Tensor, key: str) -> Tensor:
    found = state[p].get(key)
    return found if isinstance(found, Tensor) else full_precision(p)


def _gradients(named: Named, grads: Mapping[str, Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """In the precision of the averages; zeros where there is none."""
    return [grads[name].to(m.dtype) if name in grads else torch.zeros_like(m) for (name, _), m in zip(named, like)]
