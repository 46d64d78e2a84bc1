"""Triton programs of whole matrices: powers and polar factors of small ones, sums and affine maps by tiles."""

from __future__ import annotations

from symgeo.kernels.programs.tiles import jit, load_tile, product

try:
    import triton.language as tl
    from triton.language import constexpr, tensor
except ImportError:
    pass


@jit
def even(w: tensor, table: tensor, step: tensor, eye: tensor) -> tensor:
    """``a + b w + c w^2`` with the ``step``-th coefficients of the table."""
    a, b, c = tl.load(table + 3 * step), tl.load(table + 3 * step + 1), tl.load(table + 3 * step + 2)
    return a * eye + b * w + c * product(w, w, tl.float64)


@jit
def roots(a: tensor, table: tensor, first: tensor, last: tensor, eye: tensor) -> tensor:
    """``a^(1/2)`` and ``a^(-1/2)`` by the coupled iteration ``y <- y h(z y)``, ``z <- h(z y) z``."""
    y, z = a, eye
    for step in range(first, last):
        h = even(product(z, y, tl.float64), table, step, eye)
        y, z = product(y, h, tl.float64), product(h, z, tl.float64)
    return y, z


@jit
def nonzero(x: tensor) -> tensor:
    """``x``, and 1 where it is not positive: a divisor."""
    return tl.where(x > 0, x, 1.0)


@jit
def largest_eigenvalue(a: tensor, eye: tensor, SQUARINGS: constexpr) -> tensor:
    """``tr(a b) / tr(b)`` with ``b ~ a^(2^k)``."""
    b = a
    for _ in range(SQUARINGS):
        b = b / nonzero(tl.sqrt(tl.sum(b * b)))
        b = product(b, b, tl.float64)
    return tl.sum(a * b) / nonzero(tl.sum(b * eye))


@jit
def largest_singular_bound(y: tensor, SQUARINGS: constexpr) -> tensor:
    """``|(y^T y)^(2^k)|_F^(1 / 2^(k+1))``."""
    b = product(tl.trans(y), y, tl.float64)
    norm = nonzero(tl.sqrt(tl.sum(b * b)))
    logarithm, weight = 0.5 * tl.log(norm), 0.25
    for _ in tl.static_range(SQUARINGS):
        b = b / norm
        b = product(b, b, tl.float64)
        norm = nonzero(tl.sqrt(tl.sum(b * b)))
        logarithm += weight * tl.log(norm)
        weight = 0.5 * weight
    return tl.exp(logarithm)


@jit
def power_program(
    t: tensor, out: tensor, table: tensor, constants: tensor, stride_b: tensor, stride_i: tensor, stride_j: tensor,
    n: tensor, sign_steps: tensor, steps: tensor, QUARTERS: constexpr, CUT: constexpr, SQUARINGS: constexpr,
    BLOCK: constexpr,
) -> None:  # fmt: skip
    """One matrix to the power ``QUARTERS / 4``, as in the batched Newton method; constants are damping and floor."""
    b = tl.program_id(0).to(tl.int64)
    line = tl.arange(0, BLOCK).to(tl.int64)
    eye = (line[:, None] == line[None, :]).to(tl.float64)
    damping, floor = tl.load(constants), tl.load(constants + 1)
    a = load_tile(t + b * stride_b, stride_i, stride_j, line, line, n, n, tl.float64)
    a = 0.5 * (a + load_tile(t + b * stride_b, stride_j, stride_i, line, line, n, n, tl.float64))
    scale = tl.max(tl.abs(a))
    a = a / nonzero(scale)
    top = largest_eigenvalue(a, eye, SQUARINGS)
    a = a / nonzero(top) + damping * eye
    projector = eye
    if CUT:
        sign = a - floor * eye
        for step in range(0, sign_steps):
            sign = product(sign, even(product(sign, sign, tl.float64), table, step, eye), tl.float64)
        projector = 0.5 * (sign + eye)
        a = product(product(projector, a, tl.float64), projector, tl.float64) + eye - projector
    root, inverse = roots(a / (1.0 + damping), table, sign_steps, sign_steps + steps, eye)
    size = tl.sqrt(scale * top * (1.0 + damping))
    if QUARTERS == 1 or QUARTERS == -1:
        root, inverse = roots(root, table, sign_steps, sign_steps + steps, eye)
        size = tl.sqrt(size)
    result = root
    if QUARTERS < 0:
        result = inverse
        size = tl.where(size > 0, 1.0 / nonzero(size), 0.0)
    if QUARTERS == -4:
        result = product(inverse, inverse, tl.float64)
        size = size * size
    if CUT:
        result = product(product(projector, result, tl.float64), projector, tl.float64)
    result = 0.5 * size * (result + tl.trans(result))
    inside = (line[:, None] < n) & (line[None, :] < n)
    tl.store(out + b * n * n + line[:, None] * n + line[None, :], result, mask=inside)


@jit
def polar_program(
    x: tensor, out: tensor, table: tensor, stride_b: tensor, stride_m: tensor, stride_n: tensor, m: tensor, n: tensor,
    steps: tensor, SQUARINGS: constexpr, ROWS: constexpr, COLUMNS: constexpr,
) -> None:  # fmt: skip
    """The polar factor of one matrix with ``m >= n``; the zero rows and columns of its padding stay zero."""
    b = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, ROWS).to(tl.int64), tl.arange(0, COLUMNS).to(tl.int64)
    eye = (columns[:, None] == columns[None, :]).to(tl.float64)
    y = load_tile(x + b * stride_b, stride_m, stride_n, rows, columns, m, n, tl.float64)
    y = y / nonzero(tl.max(tl.abs(y)))
    y = y / largest_singular_bound(y, SQUARINGS)
    for step in range(0, steps):
        y = product(y, even(product(tl.trans(y), y, tl.float64), table, step, eye), tl.float64)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(out + b * m * n + rows[:, None] * n + columns[None, :], y, mask=inside)


@jit
def pair_sums_program(
    y: tensor, row_sums: tensor, column_sums: tensor, diagonal: tensor, entries: tensor, stride_b: tensor,
    stride_i: tensor, stride_j: tensor, n: tensor, ACC: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """What tiles ``(i, j)`` and ``(j, i)``, ``i <= j``, add to every sum; each entry is read once."""
    b, i, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    tiles = tl.num_programs(1)
    if i <= j:
        rows = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        columns = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        start, slot = y + b * stride_b, b * tiles * n
        upper = load_tile(start, stride_i, stride_j, rows, columns, n, n, ACC)
        tl.store(row_sums + slot + j * n + rows, tl.sum(upper, axis=1), mask=rows < n)
        tl.store(column_sums + slot + i * n + columns, tl.sum(upper, axis=0), mask=columns < n)
        lower = upper
        squares = tl.sum(upper * upper)
        if i == j:
            on_diagonal = tl.where(rows[:, None] == columns[None, :], upper, 0.0)
            tl.store(diagonal + b * n + rows, tl.sum(on_diagonal, axis=1), mask=rows < n)
        else:
            lower = load_tile(start, stride_i, stride_j, columns, rows, n, n, ACC)
            tl.store(row_sums + slot + i * n + columns, tl.sum(lower, axis=1), mask=columns < n)
            tl.store(column_sums + slot + j * n + rows, tl.sum(lower, axis=0), mask=rows < n)
            squares += tl.sum(lower * lower)
        crossed = tl.sum(upper * tl.trans(lower)) * tl.where(i == j, 1.0, 2.0).to(ACC)
        cell = entries + 2 * ((b * tiles + i) * tiles + j)
        tl.store(cell, squares)
        tl.store(cell + 1, crossed)


@jit
def line_sums_program(
    y: tensor, row_sums: tensor, column_sums: tensor, stride_b: tensor, stride_i: tensor, stride_j: tensor, m: tensor,
    n: tensor, ACC: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Row and column sums of one tile: the first read of the affine kernel."""
    b, i, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    tile = load_tile(y + b * stride_b, stride_i, stride_j, rows, columns, m, n, ACC)
    tl.store(row_sums + (b * tl.num_programs(2) + j) * m + rows, tl.sum(tile, axis=1), mask=rows < m)
    tl.store(column_sums + (b * tl.num_programs(1) + i) * n + columns, tl.sum(tile, axis=0), mask=columns < n)


@jit
def affine_program(
    y: tensor, factor: tensor, row_terms: tensor, column_terms: tensor, out: tensor, stride_b: tensor,
    stride_i: tensor, stride_j: tensor, m: tensor, n: tensor, ACC: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """One tile of ``factor y_ij + row_i + column_j``: the second read of the affine kernel, and its write."""
    b, i, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    tile = load_tile(y + b * stride_b, stride_i, stride_j, rows, columns, m, n, ACC)
    row = tl.load(row_terms + b * m + rows, mask=rows < m, other=0.0)
    column = tl.load(column_terms + b * n + columns, mask=columns < n, other=0.0)
    result = tl.load(factor + b) * tile + row[:, None] + column[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(out + b * m * n + rows[:, None] * n + columns[None, :], result.to(out.dtype.element_ty), mask=inside)
