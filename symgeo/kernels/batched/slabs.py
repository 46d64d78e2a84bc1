"""Products that are Hermitian, in slabs of rows from the diagonal on: of a large one little more than half is computed.

On a CPU the other half is copied: from some 300 rows on that is faster than the whole product.  Elsewhere a whole
symmetric product is one call and one pass: what slabs would gain there is not measured, and small ones leave most of a
GPU idle.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from symgeo.kernels.inputs import tracked
from symgeo.kernels.triangles import pack

#: rows of a slab at least, of a packed result and of a whole one; and how many slabs there are at most
PACKED_ROWS, WHOLE_ROWS, SLABS = 64, 128, 4


def packed_product(x: Tensor, y: Tensor) -> Tensor:
    """The upper triangle, packed, of a product ``X Y^H (..., M, M)`` that is Hermitian; ``X, Y (..., M, D)``.

    >>> x = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    >>> packed_product(x, x)
    tensor([ 1.,  3., 13.])
    """
    size = x.shape[-2]
    left, right = (a.reshape(a.shape[:-2].numel(), *a.shape[-2:]) for a in (x, y))
    if tracked(x, y):
        return pack(torch.bmm(left, right.mH).reshape(*x.shape[:-1], size))
    result = left.new_empty(len(left), size, size)
    for start, stop in slabs(size, PACKED_ROWS):
        torch.bmm(left[:, start:stop], right[:, start:].mH, out=result[:, start:stop, start:])
    return pack(result.reshape(*x.shape[:-1], size))


def whole_product(x: Tensor) -> Tensor:
    """``x x^T`` of real ``x (B, M, D)``, symmetric to the last bit: the sum of two floats has no order.

    >>> whole_product(torch.tensor([[[1.0, 0.0], [3.0, 2.0]]]))
    tensor([[[ 1.,  3.],
             [ 3., 13.]]])
    """
    if x.device.type != "cpu" or tracked(x):
        half = torch.baddbmm(x.new_empty(1, 1, 1), x, x.mT, beta=0, alpha=0.5)  # its first argument is not read
        return half + half.mT
    size = x.shape[-2]
    if size < 2 * WHOLE_ROWS:
        product = torch.bmm(x, x.mT)
        return torch.add(product, product.mT).mul_(0.5)
    result = x.new_empty(len(x), size, size)
    for start, stop in slabs(size, WHOLE_ROWS):
        torch.bmm(x[:, start:stop], x[:, start:].mT, out=result[:, start:stop, start:])
        square = result[:, start:stop, start:stop]
        square.copy_(torch.add(square, square.mT).mul_(0.5))
        result[:, stop:, start:stop] = result[:, start:stop, stop:].mT
    return result


def slabs(size: int, rows: int) -> list[tuple[int, int]]:
    """First rows and ends of the slabs; a function of the size alone.

    >>> slabs(256, 64), slabs(100, 64)
    ([(0, 64), (64, 128), (128, 192), (192, 256)], [(0, 100)])
    """
    count = min(max(size // rows, 1), SLABS)
    return list(pairwise(size * i // count for i in range(count + 1)))
