"""Passes over long vectors as Triton programs: one read of each, one write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from symgeo.kernels import programs
from symgeo.kernels.inputs import (
    MOST_VECTORS,
    accumulation_type,
    check_coefficients,
    check_map,
    check_vectors,
    same_memory,
    widest,
)
from symgeo.kernels.triton.launch import check_here, language, launch

#: entries of one program, and its warps; not measured yet
BLOCK, WARPS = 4096, 8
#: entries that are multiplied at a time for inner products, and how often before their sums are added up
LANES, STEPS = 1024, 8


def inner_products(vectors: Sequence[Tensor]) -> Tensor:
    """``G_ij = sum_k u_ik u_jk`` in float64 ``(k, k)``: sums of 8192 entries at most, then float64 in order."""
    check_vectors(vectors)
    check_here(*vectors)
    k, n, device = len(vectors), len(vectors[0]), vectors[0].device
    steps = max(1, min(STEPS, -(-n // LANES)))
    blocks = -(-n // (LANES * steps))
    sums = torch.empty(k, k, blocks, dtype=torch.float64, device=device)
    if n:
        launch(
            programs.inner_program, (blocks,), *_four(vectors), sums, *(x.stride(0) for x in _four(vectors)), n, K=k,
            ACC=language(accumulation_type(widest(vectors))), BLOCK=LANES, STEPS=steps, num_warps=WARPS,
        )  # fmt: skip
    return sums.sum(-1)


def combination(vectors: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """``sum_i c_i u_i``; the program reads the coefficients on the device."""
    check_vectors(vectors)
    check_coefficients(vectors, coefficients)
    check_here(*vectors, coefficients)
    kept, n = widest(vectors), len(vectors[0])
    out = torch.empty(n, dtype=kept, device=vectors[0].device)
    if n:
        launch(
            programs.combination_program, (-(-n // BLOCK),), *_four(vectors), coefficients, out,
            *(x.stride(0) for x in _four(vectors)), coefficients.stride(0), n, K=len(vectors),
            ACC=language(accumulation_type(kept)), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


def exponential_map(w: Tensor, z: Tensor, out: Tensor | None = None) -> Tensor:
    """``w exp(z)``, written where ``w`` or ``z`` are if ``out`` is one of them."""
    check_map(w, z, out)
    check_here(w, z, *(() if out is None else (out,)))
    target = out
    if out is None or not out.is_contiguous() or any(same_memory(out, x) and x is not out for x in (w, z)):
        target = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    assert target is not None
    n = w.numel()
    if n:
        launch(
            programs.exponential_program, (-(-n // BLOCK),), w.contiguous(), z.contiguous(), target, n,
            ACC=language(accumulation_type(widest([w, z]))), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return target if out is None or target is out else out.copy_(target)


def _four(vectors: Sequence[Tensor]) -> list[Tensor]:
    """As many vectors as a program names; the last ones are not read."""
    return [*vectors, *[vectors[0]] * (MOST_VECTORS - len(vectors))]
