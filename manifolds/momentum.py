"""Momentum that starts as a tangent vector.

``geoopt.optim.RiemannianSGD`` (0.5.1) starts its momentum buffer with the *Euclidean* gradient, a covector.
It scales differently from tangent vectors under a change of gauge, so the trajectories of two equivalent
starting points drift apart.  A buffer that already exists is left alone by geoopt, and with a zero one the
first step is plain Riemannian gradient descent: ``b_1 = (1 - dampening) grad f``.
"""

from __future__ import annotations

from typing import Any

import geoopt
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from manifolds.base import QuotientManifold

_AFFECTED = (geoopt.optim.RiemannianSGD, geoopt.optim.SparseRiemannianSGD)


def seed_momentum(optimizer: torch.optim.Optimizer, args: tuple[Any, ...] = (), kwargs: Any = None) -> None:
    """Gives parameters on a :class:`QuotientManifold` without optimizer state a zero momentum buffer.

    Touches nothing but geoopt's (sparse) Riemannian SGD with momentum.  Has the signature of a hook that runs
    before ``optimizer.step``.
    """
    if not isinstance(optimizer, _AFFECTED):
        return
    for group in optimizer.param_groups:
        if not group["momentum"] > 0:
            continue
        for p in group["params"]:
            if _on_quotient(p) and not optimizer.state.get(p):
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _on_quotient(p: torch.Tensor) -> bool:
    return isinstance(p, geoopt.ManifoldTensor) and isinstance(p.manifold, QuotientManifold)


def install() -> RemovableHandle:
    """Registers :func:`seed_momentum` for every optimizer of the process; ``.remove()`` undoes it."""
    return register_optimizer_step_pre_hook(seed_momentum)
