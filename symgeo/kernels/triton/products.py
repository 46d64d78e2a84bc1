"""Gram matrices, their running averages and applied updates as Triton programs.

Factors of half precision go to tensor cores as they are, in tiles of 128 where there are enough of them; sums are in
float32.  Rows of half precision that are centred fall between its numbers: they are multiplied as TF32, which has the
digits of float16.  float32 is multiplied exactly, or as TF32 where ``torch.backends.cuda.matmul.allow_tf32`` is on.
Tile sizes and the choice between them are not measured yet.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from symgeo.kernels import programs
from symgeo.kernels.batched.matrices import symmetric
from symgeo.kernels.inputs import (
    accumulation_type,
    check_average,
    check_matrices,
    check_update,
    interpreting,
    is_packed,
    same_memory,
)
from symgeo.kernels.triangles import pack
from symgeo.kernels.triton.launch import check_here, flat, halves, language, launch, padded

#: programs that fill a GPU, twice
MANY = 256
GROUP = 8


class Tile(NamedTuple):
    """Rows and columns of a tile of the result, columns of ``x`` at a time, warps, and loads under way."""

    block: int
    step: int
    warps: int
    stages: int


def gram(
    x: Tensor, center: bool = False, packed: bool = False, splits: int | None = None, tile: Tile | None = None
) -> Tensor:
    """``x x^T`` of ``(..., f, n)`` as :func:`symgeo.kernels.batched.gram`: upper tiles, mirrored; no centred copy.

    The means come from a pass of their own.  ``splits`` chunks of the columns are summed by different programs
    and added in order; by default as many as fill a GPU when there are few tiles.
    """
    check_matrices("x", x)
    check_here(x)
    if x.numel() == 0:
        zeros = x.new_zeros(*x.shape[:-1], x.shape[-2])
        return pack(zeros) if packed else zeros
    view = flat(x)
    batch, f, n = view.shape
    tile = tile or _tile(x.dtype, f, f, batch, x.device, True, center)
    splits = splits or _splits(batch, math.ceil(f / tile.block), n)
    kept = x.dtype if splits == 1 else accumulation_type(x.dtype)
    out = torch.empty(splits, batch, f, f, dtype=kept, device=x.device)
    _gram_into(out, view, center, tile)
    result = out[0] if splits == 1 else symmetric(out.sum(0))
    result = result.reshape(*x.shape[:-1], f).to(x.dtype)
    return pack(result) if packed else result


def ema_gram(
    t: Tensor, x: Tensor, beta: float, scale: float = 1.0, center: bool = False, splits: int | None = None,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """``t <- beta t + (1 - beta) scale x x^T`` in place: one read and one write of ``t``, of its upper tiles the read.

    With few tiles and many columns the product is formed in ``splits`` chunks first, as by :func:`gram`.
    """
    check_average(t, x, beta)
    check_here(t, x)
    if t.numel() == 0 or x.numel() == 0:
        return t.mul_(beta)
    if is_packed(t, x):
        product = gram(x.to(t.dtype), center, packed=True, splits=splits, tile=tile)
        return t.mul_(beta).add_(product, alpha=(1.0 - beta) * scale)
    view, average = flat(x), flat(t)
    if same_memory(average, view):
        view = view.clone()
    batch, f, n = view.shape
    weight = (1.0 - beta) * scale
    factors = x.dtype if t.dtype == torch.float32 else t.dtype
    tile = tile or _tile(factors, f, f, batch, x.device, True, center)
    splits = splits or _splits(batch, math.ceil(f / tile.block), n)
    if splits > 1:
        out = torch.empty(splits, batch, f, f, dtype=t.dtype, device=t.device)
        _gram_into(out, view, center, tile)
        return t.mul_(beta).add_(symmetric(out.sum(0)).reshape(t.shape), alpha=weight)
    _gram_into(average.unsqueeze(0), view, center, tile, beta, weight)
    return t if average.data_ptr() == t.data_ptr() else t.copy_(average.reshape(t.shape))


def apply_update(
    w: Tensor, p: Tensor, x: Tensor, lr: float, decay: float = 0.0, tile: Tile | None = None
) -> Tensor:  # fmt: skip
    """``w <- (1 - lr decay) w - lr p x`` in place, with one read and one write of ``w``."""
    check_update(w, p, x)
    check_here(w, p, x)
    if w.numel() == 0:
        return w
    wide = accumulation_type(w.dtype)
    written, left, right = flat(w), flat(p), flat(x)
    if same_memory(written, left, right):
        left, right = left.clone(), right.clone()
    batch, f, n = written.shape
    native = p.dtype == x.dtype and _native(x.dtype) and wide == torch.float32
    tile = tile or _tile(x.dtype if native else wide, f, n, batch, w.device, False, False)
    down, across = math.ceil(f / tile.block), math.ceil(n / tile.block)
    launch(
        programs.apply_program, (batch * down * across,), written, left, right, *written.stride(), *left.stride(),
        *right.stride(), f, n, *halves(1.0 - lr * decay), *halves(lr), NATIVE=native, PRECISION=_precision(wide),
        ACC=language(wide), BLOCK=tile.block, STEP=tile.step, GROUP=GROUP, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return w if written.data_ptr() == w.data_ptr() else w.copy_(written.reshape(w.shape))


def choose_tile(dtype: torch.dtype, m: int, n: int, count: float, capability: int, centred: bool = False) -> Tile:
    """The tile for factors of a type and a result ``(m, n)``: 128 in half precision where there are enough of them.

    ``count``: how many tiles of that size; ``capability``: of the GPU, its first digit, 0 for none.  Capability 8
    has 99 KiB of shared memory at least, of which three stages of half precision take 64; 9 has 227 KiB, of which
    four take 128.

    >>> choose_tile(torch.bfloat16, 2048, 2048, 128, capability=9)
    Tile(block=128, step=64, warps=8, stages=4)
    """
    if dtype.itemsize > 2 or capability < 8 or min(m, n) < 128:
        return Tile(min(64, padded(min(m, n))), 32, 4, 2)
    if count < MANY // 2:
        return Tile(64, 32 if centred else 64, 4, 3)
    return Tile(128, 32 if centred else 64, 8, 4 if capability in (9, 10) else 3)


def _tile(dtype: torch.dtype, m: int, n: int, batch: int, device: torch.device, symmetric: bool, centred: bool) -> Tile:
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    count = batch * math.ceil(m / 128) * math.ceil(n / 128) / (2 if symmetric else 1)
    return choose_tile(dtype, m, n, count, capability, centred)


def _splits(batch: int, tiles: int, n: int) -> int:
    return max(1, min(n // 1024, MANY // (batch * tiles * tiles)))


def _gram_into(
    out: Tensor, x: Tensor, center: bool, tile: Tile, beta: float | None = None, weight: float = 1.0
) -> None:
    """``out (splits, B, f, f)``, by chunks of the columns of ``x (B, f, n)``; with ``beta`` the average with it."""
    splits, batch, f, _ = out.shape
    n = x.shape[-1]
    wide = torch.float64 if torch.float64 in (x.dtype, out.dtype) else torch.float32
    mean = x.mean(-1, dtype=wide) if center else x
    tiles = math.ceil(f / tile.block)
    native = not center and _native(x.dtype) and wide == torch.float32
    precision = "tf32" if center and _native(x.dtype) and wide == torch.float32 else _precision(wide)
    launch(
        programs.gram_program, (batch * (tiles + 1) * ((tiles + 1) // 2), splits), x, mean, out, *x.stride(),
        *out.stride(), f, n, math.ceil(n / splits), *halves(beta or 0.0), *halves(weight), CENTER=center,
        AVERAGE=beta is not None, NATIVE=native, PRECISION=precision, ACC=language(wide), BLOCK=tile.block,
        STEP=tile.step, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _native(dtype: torch.dtype) -> bool:
    """Whether tensor cores take the factors as they are; the interpreter's arithmetic in bfloat16 is wrong."""
    return dtype.itemsize == 2 and not interpreting()


def _precision(dtype: torch.dtype) -> str:
    """How factors in float32 are multiplied."""
    return "tf32" if dtype == torch.float32 and _tf32() else "ieee"


def _tf32() -> bool:
    """Whether torch may round factors of products in float32 to TF32."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set by the newer name, after which the older one cannot be read
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
