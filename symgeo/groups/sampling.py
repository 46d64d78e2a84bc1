"""Random numbers that are the same on every device: drawn where the generator lives, then moved."""

from __future__ import annotations

import torch
from torch import Tensor


def _home(generator: torch.Generator | None, device: torch.device | str | None) -> torch.device | str | None:
    return device if generator is None else generator.device


def normal(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    """Standard normal numbers of the given shape."""
    drawn = torch.randn(shape, generator=generator, dtype=dtype, device=_home(generator, device))
    return drawn.to(device) if device is not None else drawn


def uniform(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    """Numbers uniform on [0, 1) of the given shape."""
    drawn = torch.rand(shape, generator=generator, dtype=dtype, device=_home(generator, device))
    return drawn.to(device) if device is not None else drawn


def haar(
    n: int,
    batch: tuple[int, ...],
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    """Matrices (*batch, n, n) uniform on O(n): QR of a Gaussian, with the signs of R made positive."""
    q, r = torch.linalg.qr(normal((*batch, n, n), generator, dtype, device))
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return q * signs.unsqueeze(-2)
