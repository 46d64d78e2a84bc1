"""Second moments of coordinates, their averages over time, and the blocks that they make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manifolds.linalg import widen
from symgeo.curvature import Bucket, DenseBlock, StructuredBlock
from symgeo.curvature.structured import DENSE_LIMIT, Block
from symgeo.kernels import ema_gram
from symgeo.optim.packed import hermitian_product

#: a number for everything, or a tensor that broadcasts against the second moments
Factor = float | Tensor


def is_diagonal(bucket: Bucket, trivial: str) -> bool:
    """Whether only diagonals are kept: one copy, or the trivial kind with the policy "diagonal" or "drop"."""
    return trivial in ("diagonal", "drop") if bucket.trivial else bucket.copies == 1


def moment_shape(bucket: Bucket, diagonal: bool) -> tuple[int, ...]:
    """The shape of the second moments of one kind: (B, M) or (B, M, M).

    Raises ValueError where the trivial kind is too large for a matrix.
    """
    if diagonal:
        return bucket.batch, bucket.copies
    if bucket.trivial and bucket.copies > DENSE_LIMIT:
        raise ValueError(
            f"trivial: the trivial kind has {bucket.copies} copies (all sizes on which no group acts together), too"
            f" many for a dense matrix (at most {DENSE_LIMIT}); use trivial='diagonal'"
        )
    return bucket.batch, bucket.copies, bucket.copies


def second_moment(bucket: Bucket, x: Tensor, y: Tensor | None, diagonal: bool) -> Tensor:
    """T = X Y^H / d, Y = X if None: (K, B, M, M), or its real diagonal (K, B, M)."""
    if not diagonal:
        return bucket.gram(x, y)
    product = x.abs().square() if y is None else (x * y.conj()).real  # M = 1: only its Hermitian part is used
    return product.sum(-1) / bucket.dimension


def average_(t: Tensor, bucket: Bucket, x: Tensor, y: Tensor | None, decay: Factor, diagonal: bool) -> None:
    """T <- decay T + (1 - decay) X Y^H / d, in place; of matrices with Y = X only upper triangles, which t packs."""
    weight: Factor = 1 - decay if isinstance(decay, float) else (1 - decay).to(t.dtype)
    if y is not None or diagonal:
        t.lerp_(second_moment(bucket, x, y, diagonal).to(t.dtype), weight)
        return
    if isinstance(decay, float) and not x.is_complex():
        ema_gram(t, x.to(t.dtype), decay, 1 / bucket.dimension)
        return
    moment = hermitian_product(x, x).div_(bucket.dimension)
    t.lerp_(moment, weight if isinstance(weight, float) else weight.squeeze(-1))


def debiased(t: Tensor, decay: Factor, steps: Factor) -> Tensor:
    """T / (1 - decay^steps)"""
    return t / (1 - decay**steps)


def spread_over(bucket: Bucket, values: Sequence[Sequence[float]], diagonal: bool, like: Tensor) -> Factor:
    """One number for each row of each kind, as a factor of second moments (K, B, M) or (K, B, M, M).

    A plain number where all agree.  Otherwise one for each kind or, in a diagonal trivial kind, for each copy, in
    the dtype and on the device of `like`.
    Raises ValueError naming two parameters of one kind whose numbers differ.
    """
    flat = {value for row in values for value in row}
    if len(flat) == 1:
        return flat.pop()
    if bucket.trivial and diagonal:
        repeated = [value for value, (*_, m) in zip(values[0], bucket.rows[0]) for _ in range(m)]
        return on_device(repeated, like).reshape(1, 1, -1)
    for row, sources in zip(values, bucket.rows):
        for value, (name, *_) in zip(row, sources):
            if value != row[0]:
                raise ValueError(
                    f"betas[1]: parameters {sources[0][0]!r} and {name!r} share statistics and have {row[0]} and"
                    f" {value}; give their groups the same betas[1]"
                )
    column = on_device([row[0] for row in values], like)
    return column.reshape(-1, 1, 1) if diagonal else column.reshape(-1, 1, 1, 1)


def on_device(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a vector in the dtype and on the device of `like`.

    They travel as arguments of a kernel: a copy from the host's memory would wait for all that the device still has
    to do.

    >>> on_device([0.9, 0.99], torch.empty(0))
    tensor([0.9000, 0.9900])
    """
    result = torch.zeros(len(values), dtype=like.dtype, device=like.device)
    torch._foreach_add_(list(result.unbind()), list(values))
    return result


def as_block(t: Tensor, diagonal: bool) -> Block:
    """Second moments as a block of an invariant operator.

    Those of kinds with one copy become one diagonal, so that their functions are elementwise.
    """
    return StructuredBlock.diagonal_of(t.flatten()) if diagonal else DenseBlock(t)


def as_matrix_block(bucket: Bucket, t: Tensor, diagonal: bool, symmetric: bool) -> Block:
    """The same with a matrix for each kind but a diagonal trivial one, in double precision; exactly symmetric if so."""
    if diagonal:
        return as_block(t, diagonal) if bucket.trivial else DenseBlock(widen(t).unsqueeze(-1))
    return DenseBlock(widen(0.5 * (t + t.mH) if symmetric else t))


def as_tensor(bucket: Bucket, block: Block, diagonal: bool, dtype: torch.dtype) -> Tensor:
    """The matrices (K, B, M, M) of a block, or diagonals (K, B, M), in the precision `dtype`."""
    shape = bucket.shape[:3]
    if not diagonal:
        matrix = block.to_dense().matrix
    elif isinstance(block, StructuredBlock):
        matrix = block.values.expand(block.copies).reshape(shape)
    else:
        matrix = block.matrix.reshape(shape)
    return matrix.to(dtype.to_complex() if matrix.is_complex() else dtype)


def applied(root: Tensor, x: Tensor, diagonal: bool) -> Tensor:
    """T X for every kind, (K, B, M, D)."""
    return root.unsqueeze(-1) * x if diagonal else root @ x
