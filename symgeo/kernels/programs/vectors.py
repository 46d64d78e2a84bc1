"""Triton programs of the passes over long vectors: every entry is read once, sums of blocks are stored in order."""

from __future__ import annotations

from symgeo.kernels.programs.tiles import jit

try:
    import triton.language as tl
    from triton.language import constexpr, tensor
except ImportError:
    pass


@jit
def load_entries(x: tensor, stride: tensor, entries: tensor, n: tensor, ACC: constexpr) -> tensor:
    """Some entries of a vector of ``n``, 0 beyond its end."""
    return tl.load(x + entries * stride, mask=entries < n, other=0.0).to(ACC)


@jit
def store_pair(out: tensor, i: constexpr, j: constexpr, products: tensor, K: constexpr) -> None:
    """One sum over the block, at ``(i, j, block)`` and ``(j, i, block)`` of ``out (K, K, blocks)``."""
    total = tl.sum(products).to(tl.float64)
    block, blocks = tl.program_id(0), tl.num_programs(0).to(tl.int64)
    tl.store(out + (i * K + j) * blocks + block, total)
    tl.store(out + (j * K + i) * blocks + block, total)


@jit
def inner_program(
    x0: tensor, x1: tensor, x2: tensor, x3: tensor, out: tensor, s0: tensor, s1: tensor, s2: tensor, s3: tensor,
    n: tensor, K: constexpr, ACC: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """The inner products of ``K`` vectors over one block of their entries."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = load_entries(x0, s0, entries, n, ACC)
    store_pair(out, 0, 0, a * a, K)
    if K > 1:
        b = load_entries(x1, s1, entries, n, ACC)
        store_pair(out, 0, 1, a * b, K)
        store_pair(out, 1, 1, b * b, K)
        if K > 2:
            c = load_entries(x2, s2, entries, n, ACC)
            store_pair(out, 0, 2, a * c, K)
            store_pair(out, 1, 2, b * c, K)
            store_pair(out, 2, 2, c * c, K)
            if K > 3:
                d = load_entries(x3, s3, entries, n, ACC)
                store_pair(out, 0, 3, a * d, K)
                store_pair(out, 1, 3, b * d, K)
                store_pair(out, 2, 3, c * d, K)
                store_pair(out, 3, 3, d * d, K)


@jit
def combination_program(
    x0: tensor, x1: tensor, x2: tensor, x3: tensor, c: tensor, out: tensor, s0: tensor, s1: tensor, s2: tensor,
    s3: tensor, s_c: tensor, n: tensor, K: constexpr, ACC: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """One block of ``sum_i c_i x_i``."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(c).to(ACC) * load_entries(x0, s0, entries, n, ACC)
    if K > 1:
        total += tl.load(c + s_c).to(ACC) * load_entries(x1, s1, entries, n, ACC)
    if K > 2:
        total += tl.load(c + 2 * s_c).to(ACC) * load_entries(x2, s2, entries, n, ACC)
    if K > 3:
        total += tl.load(c + 3 * s_c).to(ACC) * load_entries(x3, s3, entries, n, ACC)
    tl.store(out + entries, total.to(out.dtype.element_ty), mask=entries < n)


@jit
def exponential_program(w: tensor, z: tensor, out: tensor, n: tensor, ACC: constexpr, BLOCK: constexpr) -> None:
    """One block of ``w exp(z)``; all three lie in memory without gaps."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    result = load_entries(w, 1, entries, n, ACC) * tl.exp(load_entries(z, 1, entries, n, ACC))
    tl.store(out + entries, result.to(out.dtype.element_ty), mask=entries < n)
