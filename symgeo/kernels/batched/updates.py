"""Updates in place in plain torch; off the CPU a product is added while it is formed."""

from __future__ import annotations

import torch
from torch import Tensor

from symgeo.kernels.batched.matrices import gram
from symgeo.kernels.inputs import accumulation_type, check_average, check_update, is_packed, same_memory, tracked


def ema_gram(t: Tensor, x: Tensor, beta: float, scale: float = 1.0, center: bool = False) -> Tensor:
    """``t <- beta t + (1 - beta) scale x x^T`` in place, ``t (..., f, f)`` or packed, ``x (..., f, n)``; returns ``t``.

    >>> ema_gram(torch.eye(2), torch.tensor([[2.0], [4.0]]), beta=0.5)
    tensor([[2.5000, 4.0000],
            [4.0000, 8.5000]])
    """
    check_average(t, x, beta)
    if t.numel() == 0 or x.numel() == 0:
        return t.mul_(beta)
    wide, packed, weight = x.to(t.dtype), is_packed(t, x), (1.0 - beta) * scale
    if t.device.type == "cpu" or packed or beta == 0.0 or tracked(t, x):
        product = gram(wide, center, packed)
        return t.mul_(beta).add_(product, alpha=weight)
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    flat, average = wide.reshape(-1, *x.shape[-2:]), t.reshape(-1, *t.shape[-2:])
    half = torch.baddbmm(average, flat, flat.mT, beta=0.5 * beta, alpha=0.5 * weight).reshape(t.shape)
    return torch.add(half, half.mT, out=t)


def apply_update(w: Tensor, p: Tensor, x: Tensor, lr: float, decay: float = 0.0) -> Tensor:
    """``w <- (1 - lr decay) w - lr p x`` in place, ``w, x (..., f, n)``, ``p (..., f, f)``; returns ``w``.

    The product is formed in float32 if ``w`` is of half precision, and added to ``w`` itself if not.

    >>> apply_update(torch.ones(1, 2), torch.tensor([[2.0]]), torch.tensor([[1.0, 3.0]]), lr=0.5)
    tensor([[ 0., -2.]])
    """
    check_update(w, p, x)
    if w.numel() == 0:
        return w
    dtype = accumulation_type(w.dtype)
    flat, left, right = (y.to(dtype).reshape(-1, *y.shape[-2:]) for y in (w, p, x))
    if not tracked(w, p, x) and flat.data_ptr() == w.data_ptr() and not same_memory(w, p, x):
        flat.baddbmm_(left, right, beta=1.0 - lr * decay, alpha=-lr)
        return w
    return w.copy_(torch.baddbmm(flat, left, right, beta=1.0 - lr * decay, alpha=-lr).reshape(w.shape))
