"""Triton programs of tiled products: symmetric ones by upper tiles, and products added to what is there.

Factors of half precision go to the tensor cores as they are (``NATIVE``), with sums in float32; Triton's interpreter,
whose arithmetic in bfloat16 is wrong, widens them.  A number comes as two floats, so that float64 keeps its digits.
"""

from __future__ import annotations

from symgeo.kernels.programs.tiles import jit, load_tile

try:
    import triton.language as tl
    from triton.language import constexpr, tensor
except ImportError:
    pass


@jit
def both(high: tensor, low: tensor, ACC: constexpr) -> tensor:
    """The number of which these are the two parts."""
    return tl.full((), high, ACC) + tl.full((), low, ACC)


@jit
def gram_program(
    x: tensor, mean: tensor, out: tensor, x_b: tensor, x_f: tensor, x_n: tensor, out_s: tensor, out_b: tensor,
    out_i: tensor, out_j: tensor, f: tensor, n: tensor, chunk: tensor, keep: tensor, keep_low: tensor, weight: tensor,
    weight_low: tensor, CENTER: constexpr, AVERAGE: constexpr, NATIVE: constexpr, PRECISION: constexpr, ACC: constexpr,
    BLOCK: constexpr, STEP: constexpr,
) -> None:  # fmt: skip
    """Tile ``(i, j)``, ``i <= j``, of ``x x^T`` over one chunk of the columns, and its mirror image ``(j, i)``.

    With ``AVERAGE`` it is ``keep out + weight x x^T``; of ``out`` only upper tiles are read.  Row ``i`` of the upper
    tiles and row ``tiles - 1 - i`` make one row of ``tiles + 1``; an odd middle row is alone.
    """
    tiles = tl.cdiv(f, BLOCK)
    folded = (tiles + 1) * ((tiles + 1) // 2)
    b, place = (tl.program_id(0) // folded).to(tl.int64), tl.program_id(0) % folded
    split = tl.program_id(1)
    fold, step = place // (tiles + 1), place % (tiles + 1)
    in_first = step < tiles - fold
    i = tl.where(in_first, fold, tiles - 1 - fold)
    j = tl.where(in_first, fold + step, step - 1)
    if in_first | (i != fold):
        rows = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        columns = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        end = tl.minimum((split + 1) * chunk, n)
        k = split * chunk + tl.arange(0, STEP).to(tl.int64)
        left = x + b * x_b + rows[:, None] * x_f + k[None, :] * x_n
        right = x + b * x_b + columns[:, None] * x_f + k[None, :] * x_n
        if CENTER:
            left_mean = tl.load(mean + b * f + rows, mask=rows < f, other=0.0)[:, None]
            right_mean = tl.load(mean + b * f + columns, mask=columns < f, other=0.0)[:, None]
        total = tl.zeros((BLOCK, BLOCK), dtype=ACC)
        for _ in range(split * chunk, end, STEP):
            inside = k[None, :] < end
            u = tl.load(left, mask=(rows < f)[:, None] & inside, other=0.0)
            v = tl.load(right, mask=(columns < f)[:, None] & inside, other=0.0)
            if not NATIVE:
                u, v = u.to(ACC), v.to(ACC)
            if CENTER:
                u, v = u - tl.where(inside, left_mean, 0.0), v - tl.where(inside, right_mean, 0.0)
            total = tl.dot(u, tl.trans(v), total, input_precision=PRECISION, out_dtype=ACC)
            k += STEP
            left += tl.full((), STEP, tl.int64) * x_n
            right += tl.full((), STEP, tl.int64) * x_n
        cell = out + split.to(tl.int64) * out_s + b * out_b
        within = (rows[:, None] < f) & (columns[None, :] < f)
        if AVERAGE:
            old = load_tile(cell, out_i, out_j, rows, columns, f, f, ACC)
            total = both(keep, keep_low, ACC) * old + both(weight, weight_low, ACC) * total
            tl.debug_barrier()
        if i == j:  # a tensor core need not sum (r, c) and (c, r) in one order
            total = tl.where(rows[:, None] <= columns[None, :], total, tl.trans(total))
        total = total.to(out.dtype.element_ty)
        tl.store(cell + rows[:, None] * out_i + columns[None, :] * out_j, total, mask=within)
        tl.store(cell + columns[None, :] * out_i + rows[:, None] * out_j, total, mask=within)


@jit
def apply_program(
    w: tensor, p: tensor, x: tensor, w_b: tensor, w_i: tensor, w_j: tensor, p_b: tensor, p_i: tensor, p_j: tensor,
    x_b: tensor, x_i: tensor, x_j: tensor, f: tensor, n: tensor, keep: tensor, keep_low: tensor, rate: tensor,
    rate_low: tensor, NATIVE: constexpr, PRECISION: constexpr, ACC: constexpr, BLOCK: constexpr, STEP: constexpr,
    GROUP: constexpr,
) -> None:  # fmt: skip
    """One tile of ``keep w - rate p x``, written over ``w``; ``GROUP`` rows of tiles share what is read of ``x``."""
    down, across = tl.cdiv(f, BLOCK), tl.cdiv(n, BLOCK)
    b, place = (tl.program_id(0) // (down * across)).to(tl.int64), tl.program_id(0) % (down * across)
    first = place // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    i, j = first + place % (GROUP * across) % height, place % (GROUP * across) // height
    rows = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    k = tl.arange(0, STEP).to(tl.int64)
    left = p + b * p_b + rows[:, None] * p_i + k[None, :] * p_j
    right = x + b * x_b + k[:, None] * x_i + columns[None, :] * x_j
    total = tl.zeros((BLOCK, BLOCK), dtype=ACC)
    for _ in range(0, f, STEP):
        u = tl.load(left, mask=(rows < f)[:, None] & (k < f)[None, :], other=0.0)
        v = tl.load(right, mask=(k < f)[:, None] & (columns < n)[None, :], other=0.0)
        if not NATIVE:
            u, v = u.to(ACC), v.to(ACC)
        total = tl.dot(u, v, total, input_precision=PRECISION, out_dtype=ACC)
        k += STEP
        left += tl.full((), STEP, tl.int64) * p_j
        right += tl.full((), STEP, tl.int64) * x_i
    old = load_tile(w + b * w_b, w_i, w_j, rows, columns, f, n, ACC)
    total = both(keep, keep_low, ACC) * old - both(rate, rate_low, ACC) * total
    within = (rows[:, None] < f) & (columns[None, :] < n)
    place_of = w + b * w_b + rows[:, None] * w_i + columns[None, :] * w_j
    tl.store(place_of, total.to(w.dtype.element_ty), mask=within)
