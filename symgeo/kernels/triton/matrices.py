"""Powers and polar factors of small matrices, pair sums and affine maps as Triton programs."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from symgeo.kernels import programs
from symgeo.kernels.batched.matrices import (
    BOUND_SQUARINGS,
    NEWTON_FLOOR,
    NEWTON_POWERS,
    SQUARINGS,
    finish_pair_sums,
    polar_floor,
)
from symgeo.kernels.inputs import (
    LARGEST_PROGRAM,
    accumulation_type,
    check_coefficients_fit,
    check_matrices,
    check_power,
    cutoff,
)
from symgeo.kernels.polynomials import Step, schedule
from symgeo.kernels.triton.launch import check_here, check_untracked, flat, language, launch, padded


def power(t: Tensor, p: float, damping: float = 0.0, least: float = 0.0) -> Tensor:
    """``(t + damping max(s) I)^p`` of ``(..., n, n)``, n <= 64, p in -1, -1/2, -1/4, 1/4, 1/2; one program each.

    The Newton method of :func:`symgeo.kernels.batched.power`, in float64, with the same ``least``.  Raises
    ``ValueError`` for other sizes and powers.
    """
    check_matrices("t", t, square=True)
    check_power(p, damping, least)
    _check_size("t", t)
    if p not in NEWTON_POWERS:
        raise ValueError(f"p: backend 'triton' needs one of {NEWTON_POWERS}, found {p}; use backend='batched'")
    if t.numel() == 0:
        return t.clone()
    view, n = flat(t), t.shape[-1]
    floor = max(cutoff(t.dtype, n), NEWTON_FLOOR)
    least = max(damping, least)
    cut = least < floor
    sign = schedule(0.5 * floor) if cut else ()
    steps = schedule(math.sqrt(max(least, 0.5 * floor) / (1.0 + damping)))
    out = torch.empty(view.shape, dtype=torch.float64, device=t.device)
    launch(
        programs.power_program, (len(view),), view, out, _table((*sign, *steps), t.device),
        _table(((damping, floor, 0.0),), t.device), *view.stride(), n, len(sign), len(steps),
        QUARTERS=round(4 * p), CUT=cut, SQUARINGS=SQUARINGS, BLOCK=padded(n), num_warps=_warps(n),
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
    view = flat(x)
    tall = view if x.shape[-2] >= x.shape[-1] else view.mT
    batch, m, n = tall.shape
    steps = schedule(polar_floor(x.dtype, torch.float64, m), cut=True)
    out = torch.empty(batch, m, n, dtype=torch.float64, device=x.device)
    launch(
        programs.polar_program, (batch,), tall, out, _table(steps, x.device), *tall.stride(), m, n, len(steps),
        SQUARINGS=BOUND_SQUARINGS, ROWS=padded(m), COLUMNS=padded(n), num_warps=_warps(m),
    )  # fmt: skip
    return (out if tall is view else out.mT).reshape(x.shape).to(x.dtype)


def pair_sums(y: Tensor) -> Tensor:
    """The ten sums of ``(..., n, n)`` in one read, as :func:`symgeo.kernels.reference.pair_sums`."""
    check_matrices("y", y, square=True)
    if y.numel() == 0:
        return y.new_zeros(*y.shape[:-2], 10)
    wide, view = accumulation_type(y.dtype), flat(y)
    batch, n, _ = view.shape
    block, warps = _tile(n)
    tiles = math.ceil(n / block)
    row_sums, column_sums = (torch.empty(batch, tiles, n, dtype=wide, device=y.device) for _ in range(2))
    diagonal = torch.empty(batch, n, dtype=wide, device=y.device)
    entries = torch.zeros(batch, tiles, tiles, 2, dtype=wide, device=y.device)
    launch(
        programs.pair_sums_program, (batch, tiles, tiles), view, row_sums, column_sums, diagonal, entries,
        *view.stride(), n, ACC=language(wide), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    sums = finish_pair_sums(row_sums.sum(1), column_sums.sum(1), diagonal, *entries.sum((1, 2)).unbind(-1))
    return sums.reshape(*y.shape[:-2], 10).to(y.dtype)


def affine(y: Tensor, a: float | Tensor, b: float | Tensor, c: float | Tensor, d: float | Tensor) -> Tensor:
    """``a y + b rowmean + c colmean + d mean`` of ``(..., m, n)`` in two reads and one write."""
    check_matrices("y", y)
    check_coefficients_fit(y, a=a, b=b, c=c, d=d)
    check_here(y)
    check_untracked(*(k for k in (a, b, c, d) if isinstance(k, Tensor)))
    if y.numel() == 0:
        return y.clone()
    wide, view = accumulation_type(y.dtype), flat(y)
    batch, m, n = view.shape
    block, warps = _tile(min(m, n))
    grid = (batch, math.ceil(m / block), math.ceil(n / block))
    row_sums = torch.empty(batch, grid[2], m, dtype=wide, device=y.device)
    column_sums = torch.empty(batch, grid[1], n, dtype=wide, device=y.device)
    blocks = {"ACC": language(wide), "BLOCK": block, "num_warps": warps}
    launch(programs.line_sums_program, grid, view, row_sums, column_sums, *view.stride(), m, n, **blocks)
    a, b, c, d = (_coefficient(k, y, wide) for k in (a, b, c, d))
    rows, columns = row_sums.sum(1) / n, column_sums.sum(1) / m
    row_terms = b[:, None] * rows + d[:, None] * rows.mean(-1, keepdim=True)
    column_terms = c[:, None] * columns
    out = torch.empty(view.shape, dtype=y.dtype, device=y.device)
    launch(programs.affine_program, grid, view, a, row_terms, column_terms, out, *view.stride(), m, n, **blocks)
    return out.reshape(y.shape)


def _tile(size: int) -> tuple[int, int]:
    """Rows of a square tile and warps for it: large ones write fewer partial sums, small ones are more programs.

    Not measured yet.
    """
    return (64, 8) if size >= 512 else (32, 4)


def _warps(size: int) -> int:
    """Warps for one matrix: enough threads that its float64 tiles stay in registers, or nearly."""
    return 8 if padded(size) == LARGEST_PROGRAM else 4


def _check_size(name: str, x: Tensor) -> None:
    if max(x.shape[-2:]) > LARGEST_PROGRAM:
        raise ValueError(
            f"{name}: backend 'triton' needs matrices up to {LARGEST_PROGRAM} x {LARGEST_PROGRAM}, "
            f"found {tuple(x.shape)}; use backend='batched'"
        )


@lru_cache(maxsize=256)
def _table(steps: tuple[Step, ...], device: torch.device) -> Tensor:
    """Coefficients on the device, kept: copying them there anew each step would cost more than the step."""
    return torch.tensor(steps, dtype=torch.float64, device=device)


def _coefficient(value: float | Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """One number for each matrix, ``(B,)``."""
    return torch.as_tensor(value, dtype=dtype, device=y.device).expand(y.shape[:-2]).reshape(-1).contiguous()
