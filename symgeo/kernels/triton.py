"""The kernels as Triton programs (:mod:`symgeo.kernels.programs`): here shapes, strides, tables and launches.

They run on a GPU, or on CPU tensors in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is imported).
Batch dimensions and strides are arbitrary; a batch that is no view of equally spaced matrices is copied once.
They have no derivative.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from symgeo.kernels import programs
from symgeo.kernels.batched import (
    BOUND_SQUARINGS,
    NEWTON_FLOOR,
    NEWTON_POWERS,
    SQUARINGS,
    finish_pair_sums,
    polar_floor,
    symmetric,
)
from symgeo.kernels.inputs import (
    LARGEST_PROGRAM,
    accumulation_type,
    check_matrices,
    check_power,
    cutoff,
    interpreting,
)
from symgeo.kernels.polynomials import Step, schedule

TILE = 32


def gram(x: Tensor, center: bool = False, splits: int | None = None) -> Tensor:
    """``x x^T`` of ``(..., f, n)`` as :func:`symgeo.kernels.batched.gram`: upper tiles, mirrored; no centred copy.

    The means come from a pass of their own.  ``splits`` chunks of the columns are summed by different programs
    and added in order; by default as many as fill a GPU when there are few tiles.
    """
    check_matrices("x", x)
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], x.shape[-2])
    wide, flat = accumulation_type(x.dtype), _flat(x)
    batch, f, n = flat.shape
    mean = flat.mean(-1, dtype=wide) if center else flat
    block = min(64, _padded(f))
    tiles = math.ceil(f / block)
    if splits is None:
        splits = max(1, min(n // 1024, 256 // (batch * tiles * tiles)))
    out = torch.empty(splits, batch, f, f, dtype=wide, device=x.device)
    _launch(
        programs.gram_program, (batch, tiles * tiles, splits), flat, mean, out, *flat.stride(), batch, f, n,
        math.ceil(n / splits), CENTER=center, ACC=_language(wide), BLOCK=block, STEP=32,
    )  # fmt: skip
    result = out[0] if splits == 1 else symmetric(out.sum(0))
    return result.reshape(*x.shape[:-1], f).to(x.dtype)


def power(t: Tensor, p: float, damping: float = 0.0) -> Tensor:
    """``(t + damping max(s) I)^p`` of ``(..., n, n)``, n <= 64, p in -1, -1/2, -1/4, 1/4, 1/2; one program each.

    The Newton method of :func:`symgeo.kernels.batched.power`, in float64.  Raises ``ValueError`` for other sizes
    and powers.
    """
    check_matrices("t", t, square=True)
    check_power(p, damping)
    _check_size("t", t)
    if p not in NEWTON_POWERS:
        raise ValueError(f"p: backend 'triton' needs one of {NEWTON_POWERS}, found {p}; use backend='batched'")
    if t.numel() == 0:
        return t.clone()
    flat, n = _flat(t), t.shape[-1]
    floor = max(cutoff(t.dtype, n), NEWTON_FLOOR)
    cut = damping < floor
    sign = schedule(0.5 * floor) if cut else ()
    steps = schedule(math.sqrt(max(damping, 0.5 * floor) / (1.0 + damping)))
    out = torch.empty(flat.shape, dtype=torch.float64, device=t.device)
    _launch(
        programs.power_program, (len(flat),), flat, out, _table((*sign, *steps), t.device),
        _table(((damping, floor, 0.0),), t.device), *flat.stride(), n, len(sign), len(steps),
        QUARTERS=round(4 * p), CUT=cut, SQUARINGS=SQUARINGS, BLOCK=_padded(n), num_warps=_warps(n),
    )  # fmt: skip
    return out.reshape(t.shape).to(t.dtype)


def polar(x: Tensor) -> Tensor:
    """The polar factor of ``(..., m, n)``, m, n <= 64, as :func:`symgeo.kernels.batched.polar`, in float64.

    One program for each matrix.  Raises ``ValueError`` for larger ones.
    """
    check_matrices("x", x)
    _check_size("x", x)
    if x.numel() == 0:
        return x.clone()
    flat = _flat(x)
    tall = flat if x.shape[-2] >= x.shape[-1] else flat.mT
    batch, m, n = tall.shape
    steps = schedule(polar_floor(x.dtype, torch.float64, m), cut=True)
    out = torch.empty(batch, m, n, dtype=torch.float64, device=x.device)
    _launch(
        programs.polar_program, (batch,), tall, out, _table(steps, x.device), *tall.stride(), m, n, len(steps),
        SQUARINGS=BOUND_SQUARINGS, ROWS=_padded(m), COLUMNS=_padded(n), num_warps=_warps(m),
    )  # fmt: skip
    return (out if tall is flat else out.mT).reshape(x.shape).to(x.dtype)


def pair_sums(y: Tensor) -> Tensor:
    """The ten sums of ``(..., n, n)`` in one read, as :func:`symgeo.kernels.reference.pair_sums`."""
    check_matrices("y", y, square=True)
    if y.numel() == 0:
        return y.new_zeros(*y.shape[:-2], 10)
    wide, flat = accumulation_type(y.dtype), _flat(y)
    batch, n, _ = flat.shape
    tiles = math.ceil(n / TILE)
    row_sums, column_sums = (torch.empty(batch, tiles, n, dtype=wide, device=y.device) for _ in range(2))
    diagonal = torch.empty(batch, n, dtype=wide, device=y.device)
    entries = torch.zeros(batch, tiles, tiles, 2, dtype=wide, device=y.device)
    _launch(
        programs.pair_sums_program, (batch, tiles, tiles), flat, row_sums, column_sums, diagonal, entries,
        *flat.stride(), n, ACC=_language(wide), BLOCK=TILE,
    )  # fmt: skip
    sums = finish_pair_sums(row_sums.sum(1), column_sums.sum(1), diagonal, *entries.sum((1, 2)).unbind(-1))
    return sums.reshape(*y.shape[:-2], 10).to(y.dtype)


def affine(y: Tensor, a: float | Tensor, b: float | Tensor, c: float | Tensor, d: float | Tensor) -> Tensor:
    """``a y + b rowmean + c colmean + d mean`` of ``(..., m, n)`` in two reads and one write."""
    check_matrices("y", y)
    if y.numel() == 0:
        return y.clone()
    wide, flat = accumulation_type(y.dtype), _flat(y)
    batch, m, n = flat.shape
    grid = (batch, math.ceil(m / TILE), math.ceil(n / TILE))
    row_sums = torch.empty(batch, grid[2], m, dtype=wide, device=y.device)
    column_sums = torch.empty(batch, grid[1], n, dtype=wide, device=y.device)
    blocks = {"ACC": _language(wide), "BLOCK": TILE}
    _launch(programs.line_sums_program, grid, flat, row_sums, column_sums, *flat.stride(), m, n, **blocks)
    a, b, c, d = (_coefficient(k, y, wide) for k in (a, b, c, d))
    rows, columns = row_sums.sum(1) / n, column_sums.sum(1) / m
    row_terms = b[:, None] * rows + d[:, None] * rows.mean(-1, keepdim=True)
    column_terms = c[:, None] * columns
    out = torch.empty(flat.shape, dtype=y.dtype, device=y.device)
    _launch(programs.affine_program, grid, flat, a, row_terms, column_terms, out, *flat.stride(), m, n, **blocks)
    return out.reshape(y.shape)


def _launch(program: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(arguments[0]):
        program[grid](*arguments, **constants)


def _flat(x: Tensor) -> Tensor:
    """``(..., m, n) -> (B, m, n)``, a view wherever the strides permit; raises where nothing could be launched."""
    if x.device.type == "cpu" and not interpreting():
        raise ValueError("backend 'triton' needs a tensor on a GPU, found one on the CPU; use backend='batched'")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("backend 'triton' has no derivative; detach the tensor, or use backend='batched'")
    return x.reshape(-1, *x.shape[-2:])


def _padded(size: int) -> int:
    """The power of two that holds ``size``, and at least 16, which tensor cores ask for."""
    return max(16, 1 << (size - 1).bit_length())


def _warps(size: int) -> int:
    """Warps for one matrix: enough threads that its float64 tiles stay in registers, or nearly."""
    return 8 if _padded(size) == LARGEST_PROGRAM else 4


def _check_size(name: str, x: Tensor) -> None:
    if max(x.shape[-2:]) > LARGEST_PROGRAM:
        raise ValueError(
            f"{name}: backend 'triton' needs matrices up to {LARGEST_PROGRAM} x {LARGEST_PROGRAM}, "
            f"found {tuple(x.shape)}; use backend='batched'"
        )


def _language(dtype: torch.dtype) -> Any:
    """Triton's name for the accumulation type."""
    return programs.tl.float64 if dtype == torch.float64 else programs.tl.float32


@lru_cache(maxsize=256)
def _table(steps: tuple[Step, ...], device: torch.device) -> Tensor:
    """Coefficients on the device, kept: copying them there anew each step would cost more than the step."""
    return torch.tensor(steps, dtype=torch.float64, device=device)


def _coefficient(value: float | Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """One number for each matrix, ``(B,)``."""
    return torch.as_tensor(value, dtype=dtype, device=y.device).expand(y.shape[:-2]).reshape(-1).contiguous()
