"""Hermitian matrices by their upper triangles: (..., M, M) as (..., M (M + 1) / 2), and products that are Hermitian."""

from __future__ import annotations

from torch import Tensor

from symgeo import kernels
from symgeo.kernels.batched.slabs import packed_product
from symgeo.kernels.triangles import pack, unpack


def hermitian_product(x: Tensor, y: Tensor) -> Tensor:
    """The upper triangle, packed, of a product X Y^H (..., M, M) that is Hermitian: X, Y (..., M, D).

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    >>> hermitian_product(x, x)
    tensor([ 1.,  3., 13.])
    """
    return kernels.gram(x, packed=True) if y is x and not x.is_complex() else packed_product(x, y)


__all__ = ["hermitian_product", "pack", "unpack"]
