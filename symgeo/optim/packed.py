"""Hermitian matrices by their upper triangles: (..., M, M) as (..., M (M + 1) / 2), and products that are Hermitian."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

#: rows of a slab at least, and how many slabs there are at most
_SLAB, _SLABS = 64, 4


def pack(t: Tensor) -> Tensor:
    """The upper triangle, row by row; what is below the diagonal is not read.

    >>> pack(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
    tensor([1., 2., 3.])
    """
    return _taken(t.flatten(-2), _indices(t.shape[-1], t.device)[0])


def unpack(t: Tensor, size: int) -> Tensor:
    """The Hermitian matrices (..., size, size) of upper triangles.

    >>> unpack(torch.tensor([1.0, 2.0, 3.0]), 2)
    tensor([[1., 2.],
            [2., 3.]])
    """
    full = _taken(t, _indices(size, t.device)[1]).unflatten(-1, (size, size))
    return full.triu() + full.tril(-1).conj() if full.is_complex() else full


def hermitian_product(x: Tensor, y: Tensor) -> Tensor:
    """The upper triangle, packed, of a product X Y^H (..., M, M) that is Hermitian: X, Y (..., M, D).

    In slabs of rows, from the diagonal on: of a large product little more than half is computed.

    >>> x = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    >>> hermitian_product(x, x)
    tensor([ 1.,  3., 13.])
    """
    size = x.shape[-2]
    left, right = (a.reshape(-1, *a.shape[-2:]) for a in (x, y))
    result = left.new_empty(len(left), size, size)
    slabs = min(max(size // _SLAB, 1), _SLABS)
    bounds = [size * i // slabs for i in range(slabs + 1)]
    for start, stop in pairwise(bounds):
        torch.bmm(left[:, start:stop], right[:, start:].mH, out=result[:, start:stop, start:])
    return pack(result.reshape(*x.shape[:-1], size))


def _taken(t: Tensor, indices: Tensor) -> Tensor:
    """Entries of the last axis; as a matrix, for which torch on a CPU is ten times faster."""
    return t.reshape(-1, t.shape[-1]).index_select(1, indices).reshape(*t.shape[:-1], -1)


@lru_cache(maxsize=64)
def _indices(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the entries of the triangle are in the matrix, and those of the matrix in the triangle, both flat."""
    rows, columns = torch.triu_indices(size, size, device=device)
    places = torch.arange(len(rows), dtype=torch.int32, device=device)
    square = torch.empty(size, size, dtype=torch.int32, device=device)
    square[rows, columns] = places
    square[columns, rows] = places
    return (rows * size + columns).int(), square.flatten()
