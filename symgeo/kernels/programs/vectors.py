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
def store_pair(out: tensor, i: constexpr, j: constexpr, sums: tensor, K: constexpr) -> None:
    """One sum over the entries of a program, at ``(i, j)`` and ``(j, i)`` of its column of ``out (K, K, programs)``."""
    total = tl.sum(sums).to(tl.float64)
    place, count = tl.program_id(0), tl.num_programs(0).to(tl.int64)
    tl.store(out + (i * K + j) * count + place, total)
    tl.store(out + (j * K + i) * count + place, total)


@jit
def inner_program(
    x0: tensor, x1: tensor, x2: tensor, x3: tensor, out: tensor, s0: tensor, s1: tensor, s2: tensor, s3: tensor,
    n: tensor, K: constexpr, ACC: constexpr, BLOCK: constexpr, STEPS: constexpr,
) -> None:  # fmt: skip
    """The inner products of ``K`` vectors over ``STEPS`` blocks of their entries, added up lane by lane first."""
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), dtype=ACC)
    aa, ab, bb, ac, bc, cc, ad, bd, cd, dd = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    for step in tl.static_range(STEPS):
        entries = first + step * BLOCK
        a = load_entries(x0, s0, entries, n, ACC)
        aa += a * a
        if K > 1:
            b = load_entries(x1, s1, entries, n, ACC)
            ab, bb = ab + a * b, bb + b * b
            if K > 2:
                c = load_entries(x2, s2, entries, n, ACC)
                ac, bc, cc = ac + a * c, bc + b * c, cc + c * c
                if K > 3:
                    d = load_entries(x3, s3, entries, n, ACC)
                    ad, bd, cd, dd = ad + a * d, bd + b * d, cd + c * d, dd + d * d
    store_pair(out, 0, 0, aa, K)
    if K > 1:
        store_pair(out, 0, 1, ab, K)
        store_pair(out, 1, 1, bb, K)
    if K > 2:
        store_pair(out, 0, 2, ac, K)
        store_pair(out, 1, 2, bc, K)
        store_pair(out, 2, 2, cc, K)
    if K > 3:
        store_pair(out, 0, 3, ad, K)
        store_pair(out, 1, 3, bd, K)
        store_pair(out, 2, 3, cd, K)
        store_pair(out, 3, 3, dd, K)


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
