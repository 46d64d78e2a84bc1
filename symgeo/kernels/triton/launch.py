"""What the launches of Triton programs share: flattened batches, types, and numbers on their way to a program."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from symgeo.kernels.inputs import interpreting, tracked
from symgeo.kernels.programs import tiles


def launch(program: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs a program on the device of its first argument."""
    with torch.cuda.device_of(arguments[0]):
        program[grid](*arguments, **constants)


def check_here(*tensors: Tensor) -> None:
    """Raises ``ValueError`` where nothing could be launched, and for tensors that ask for a derivative."""
    check_untracked(*tensors)
    if any(x.device.type == "cpu" for x in tensors) and not interpreting():
        raise ValueError("backend 'triton' needs a tensor on a GPU, found one on the CPU; use backend='batched'")


def check_untracked(*tensors: Tensor) -> None:
    """Raises ``ValueError`` for tensors that ask for a derivative of either mode, and under ``torch.func``."""
    if tracked(*tensors):
        raise ValueError(
            "backend 'triton' has no derivative, of either mode, and does not run under torch.func; detach the tensor,"
            " or use backend='batched'"
        )


def flat(x: Tensor) -> Tensor:
    """``(..., m, n) -> (B, m, n)``, a view wherever the strides permit."""
    check_here(x)
    return x.reshape(-1, *x.shape[-2:])


def padded(size: int) -> int:
    """The power of two that holds ``size``, and at least 16, which tensor cores ask for."""
    return max(16, 1 << (size - 1).bit_length())


def language(dtype: torch.dtype) -> Any:
    """Triton's name for the accumulation type."""
    return tiles.tl.float64 if dtype == torch.float64 else tiles.tl.float32


def halves(value: float) -> tuple[float, float]:
    """A number as the sum of two of single precision: what a program is given is a float32.

    >>> sum(halves(0.1)) - 0.1
    0.0
    """
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high
