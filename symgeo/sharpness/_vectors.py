"""Passes over flat vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def inner_products(vectors: Sequence[Tensor]) -> Tensor:
    """All inner products, in double precision."""
    return torch.stack([torch.stack([torch.dot(a, b) for b in vectors]) for a in vectors]).double()


def combination(vectors: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """``sum_i c_i v_i``"""
    out = coefficients[0].to(vectors[0].dtype) * vectors[0]
    for c, v in zip(coefficients[1:], vectors[1:]):
        out.addcmul_(c.to(v.dtype), v)
    return out
