"""Passes over long vectors in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from symgeo.kernels.inputs import (
    accumulation_type,
    check_coefficients,
    check_map,
    check_vectors,
    same_memory,
    tracked,
    widest,
)

BLOCK = 1024  # entries that are summed in the accumulation type
CACHED_BLOCKS, QUEUED_BLOCKS = 64, 4096  # blocks at a time, on the CPU and elsewhere


def inner_products(vectors: Sequence[Tensor], method: str | None = None) -> Tensor:
    """``G_ij = sum_k u_ik u_jk`` in float64, ``(n,)`` each ``-> (k, k)``.

    A few blocks of every vector are copied beside each other, and what they give is added in float64 in order; on
    the CPU they stay in its cache.  ``method`` "product" (the default on the CPU) multiplies matrices, "sum" (the
    default elsewhere) adds up products of entries, which no setting rounds to TF32.

    >>> inner_products([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]).tolist()
    [[5.0, 11.0], [11.0, 25.0]]
    """
    check_vectors(vectors)
    n, wide, on_cpu = len(vectors[0]), accumulation_type(widest(vectors)), vectors[0].device.type == "cpu"
    method = method or ("product" if on_cpu else "sum")
    if method not in ("product", "sum"):
        raise ValueError(f"method: needed 'product', 'sum' or None, found {method!r}")
    size = BLOCK * (CACHED_BLOCKS if on_cpu else QUEUED_BLOCKS)
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors[0].device)
    for start in range(0, n, size):
        x = torch.stack([u[start : start + size].to(wide) for u in vectors])
        block = min(BLOCK, x.shape[1])
        if x.shape[1] % block:
            x = torch.nn.functional.pad(x, (0, -x.shape[1] % block))
        x = x.unflatten(1, (-1, block)).transpose(0, 1)
        sums = x @ x.mT if method == "product" else torch.stack([(u[:, None] * x).sum(-1) for u in x.unbind(1)], 1)
        total = total + sums.to(torch.float64).sum(0)
    return total.triu() + total.triu(1).mT


def combination(vectors: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """``sum_i c_i u_i`` of vectors ``(n,)``, coefficients ``(k,)`` on their device; summed in float32 at least.

    >>> combination([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], torch.tensor([2.0, -1.0]))
    tensor([-1.,  0.])
    """
    check_vectors(vectors)
    check_coefficients(vectors, coefficients)
    kept = widest(vectors)
    wide = accumulation_type(kept)
    c = coefficients.to(wide)
    total = vectors[0].to(wide) * c[0]
    add = torch.addcmul if tracked(*vectors, coefficients) else Tensor.addcmul_
    for i, u in enumerate(vectors[1:], 1):
        total = add(total, u.to(wide), c[i])
    return total.to(kept)


def exponential_map(w: Tensor, z: Tensor, out: Tensor | None = None) -> Tensor:
    """``w exp(z)`` of tensors of one shape, in the type of ``w``; into ``out``, which may be ``w`` or ``z``, if given.

    >>> exponential_map(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0]))
    tensor([ 1.0000, -5.4366])
    """
    check_map(w, z, out)
    wide = accumulation_type(widest([w, z]))
    if tracked(w, z):
        result = (w.to(wide) * z.to(wide).exp()).to(w.dtype)
    elif out is not None and out.dtype == z.dtype == wide and not same_memory(out, w, z):
        return torch.exp(z, out=out).mul_(w)
    else:
        result = z.to(wide).exp().mul_(w).to(w.dtype)
    return result if out is None else out.copy_(result)
