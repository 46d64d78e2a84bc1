"""Eigenvalues of a block, what counts as zero among them, and damped powers of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

#: eigenvalues below this many roundings of the largest one are zero
_SLACK = 4.0


#: how the largest eigenvalue is agreed on where several processes hold blocks of one operator
_AGREEMENT: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("agreement", default=None)


@contextmanager
def agreeing(how: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Within this context ``s_max`` is that of all processes: ``how`` makes it from this one's.

    Every damped function of blocks calls it once, also where there are no blocks.
    """
    token = _AGREEMENT.set(how)
    try:
        yield
    finally:
        _AGREEMENT.reset(token)


def largest_of(sizes: Sequence[Tensor], damping: float) -> Tensor:
    """The largest of several sizes, a scalar; of all processes within `agreeing`, if there is any damping to scale.

    >>> largest_of([torch.tensor(1.0), torch.tensor(3.0)], 0.1)
    tensor(3.)
    """
    found = torch.stack(list(sizes)).amax() if sizes else torch.zeros((), dtype=torch.float64)
    agree = _AGREEMENT.get()
    return found if agree is None or damping == 0 else agree(found.double()).to(found)


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a symmetric block.

    Attributes
    ----------
    values: (K, B, m)
    vectors: (K, B, M, m) orthonormal columns, or None if the block is diagonal and m = M
    count, rest: the other M - m dimensions have the eigenvalue `rest` (K, B)
    threshold: (K, B), eigenvalues up to this size are zero
    """

    values: Tensor
    vectors: Tensor | None
    count: int
    rest: Tensor
    threshold: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest absolute eigenvalue of all, a scalar."""
        largest = self.values.abs().max() if self.values.numel() else self.rest.new_zeros(())
        return torch.maximum(largest, self.rest.abs().max()) if self.count else largest

    def map(self, function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """function(value, whether it is zero) of `values` and of `rest`."""
        limit = self.threshold.unsqueeze(-1)
        values = function(self.values, self.values.abs() <= limit)
        return values, function(self.rest, self.rest.abs() <= self.threshold)


def threshold(largest: Tensor, size: int, squared: bool = False) -> Tensor:
    """What counts as zero beside the largest eigenvalue: 4 eps size largest.

    With `squared`, the eigenvalues are squares of singular values, whose own errors are that small.
    """
    relative = _SLACK * torch.finfo(largest.dtype).eps * size
    return largest * (relative**2 if squared else relative)


def damped_power(exponent: float, damping: float, largest: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(|s| + damping largest)^p, where 0^p = 0; without damping and for whole p the ordinary power s^p.

    Raises ValueError for a damping that is negative or not finite.
    """
    check_damping(damping)

    def power(s: Tensor, zero: Tensor) -> Tensor:
        if damping == 0:
            zero, base = zero | (s == 0), s if float(exponent).is_integer() else s.abs()
        else:
            base = s.abs() + damping * largest
            zero = base == 0
        return torch.where(zero, 0.0, torch.where(zero, 1.0, base) ** exponent)

    return power


def check_damping(damping: float) -> None:
    """Raises ValueError unless damping is finite and not negative."""
    if not (isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be finite and >= 0; got {damping}")
