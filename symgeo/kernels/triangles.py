"""Hermitian matrices by their upper triangles: (..., M, M) as (..., M (M + 1) / 2)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


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


def _taken(t: Tensor, indices: Tensor) -> Tensor:
    """Entries of the last axis; as a matrix, for which torch on a CPU is ten times faster."""
    rows = t.numel() // t.shape[-1] if t.shape[-1] else t.shape[:-1].numel()
    return t.reshape(rows, t.shape[-1]).index_select(1, indices).reshape(*t.shape[:-1], len(indices))


@lru_cache(maxsize=64)
def _indices(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the entries of the triangle are in the matrix, and those of the matrix in the triangle, both flat."""
    rows, columns = torch.triu_indices(size, size, device=device)
    places = torch.arange(len(rows), dtype=torch.int32, device=device)
    square = torch.empty(size, size, dtype=torch.int32, device=device)
    square[rows, columns] = places
    square[columns, rows] = places
    return (rows * size + columns).int(), square.flatten()
