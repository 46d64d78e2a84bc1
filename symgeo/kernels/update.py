"""Two updates in place, for the state and the step of a preconditioned optimizer: one pass where torch needs two."""

from __future__ import annotations

import torch
from torch import Tensor

from symgeo.kernels.inputs import accumulation_type, check_matrices


def ema_gram(t: Tensor, x: Tensor, beta: float, scale: float = 1.0, center: bool = False) -> Tensor:
    """``t <- beta t + (1 - beta) scale x x^T`` in place, ``t (..., f, f)``, ``x (..., f, n)``; returns ``t``.

    The product is added while it is formed.  ``t`` stays symmetric to the last bit; ``center`` subtracts the row
    means of ``x`` first.  Raises ``ValueError`` when ``t`` is kept in half precision, in which an average of
    Gram matrices loses its definiteness, or does not fit ``x``.

    >>> t = torch.eye(2)
    >>> ema_gram(t, torch.tensor([[2.0], [4.0]]), beta=0.5)
    tensor([[2.5000, 4.0000],
            [4.0000, 8.5000]])
    """
    check_matrices("x", x)
    check_matrices("t", t, square=True)
    if t.dtype != accumulation_type(t.dtype):
        raise ValueError(f"t: an average of Gram matrices needs float32 or float64, found {t.dtype}")
    wanted = (*x.shape[:-1], x.shape[-2])
    if tuple(t.shape) != wanted:
        raise ValueError(f"t: x of shape {tuple(x.shape)} needs t of shape {wanted}, found {tuple(t.shape)}")
    wide = x.to(t.dtype)
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    flat = wide.reshape(-1, *x.shape[-2:])
    sums = torch.baddbmm(t.reshape(-1, *t.shape[-2:]), flat, flat.mT, beta=beta, alpha=(1.0 - beta) * scale)
    return t.copy_(((sums + sums.mT) * 0.5).reshape(t.shape))


def apply_update(w: Tensor, p: Tensor, x: Tensor, lr: float, decay: float = 0.0) -> Tensor:
    """``w <- (1 - lr decay) w - lr p x`` in place, ``w, x (..., f, n)``, ``p (..., f, f)``; returns ``w``.

    The product is formed in float32 if ``w`` is of half precision.  Raises ``ValueError`` if shapes do not fit.

    >>> apply_update(torch.ones(1, 2), torch.tensor([[2.0]]), torch.tensor([[1.0, 3.0]]), lr=0.5)
    tensor([[ 0., -2.]])
    """
    check_matrices("w", w)
    wanted = (*w.shape[:-1], w.shape[-2])
    if tuple(x.shape) != tuple(w.shape) or tuple(p.shape) != wanted:
        raise ValueError(
            f"p, x: w of shape {tuple(w.shape)} needs p of shape {wanted} and x like w, "
            f"found {tuple(p.shape)} and {tuple(x.shape)}"
        )
    dtype = accumulation_type(w.dtype)
    flat, left, right = (y.to(dtype).reshape(-1, *y.shape[-2:]) for y in (w, p, x))
    return w.copy_(torch.baddbmm(flat, left, right, beta=1.0 - lr * decay, alpha=-lr).reshape(w.shape))
