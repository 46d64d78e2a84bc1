"""Transforms under abelian groups: signs of single entries, cyclic shifts, rotations of planes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from symgeo.curvature.transform import OutAxis, Output


@dataclass(frozen=True)
class SignPairs:
    """{-1, 1}^n on both halves of (..., *shape, *shape), n = prod(shape): the diagonal is trivial, every pair {i, j}
    is a kind of dimension 1 with the copies y_ij and y_ji (i < j)."""

    shape: tuple[int, ...]

    exact = True

    @property
    def size(self) -> int:
        """n"""
        return math.prod(self.shape)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The diagonal, as copies, and for n > 1 the pairs."""
        n = self.size
        pairs = Output(((0, "pair"),), (OutAxis("batch", n * (n - 1) // 2), OutAxis("copy", 2)))
        diagonal = Output((), (OutAxis("copy", n),))
        return (diagonal, pairs) if n > 1 else (diagonal,)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(..., *shape, *shape) -> (..., n), (..., n (n - 1) / 2, 2)"""
        x = x.reshape(*x.shape[: x.dim() - 2 * len(self.shape)], self.size, self.size)
        diagonal = x.diagonal(dim1=-2, dim2=-1)
        if self.size == 1:
            return [diagonal]
        i, j = torch.triu_indices(self.size, self.size, 1, device=x.device)
        return [diagonal, torch.stack([x[..., i, j], x[..., j, i]], dim=-1)]

    def inverse(self, parts: list[Tensor]) -> Tensor:
        """Every entry read from where it went."""
        n, square = self.size, (*self.shape, *self.shape)
        if n == 1:
            return parts[0].reshape(*parts[0].shape[:-1], *square)
        i, j = torch.triu_indices(n, n, 1, device=parts[0].device)
        units = torch.arange(n, device=parts[0].device)
        places = torch.cat([units * (n + 1), torch.stack([i * n + j, j * n + i], dim=-1).flatten()])
        flat = torch.cat([parts[0], parts[1].flatten(-2)], dim=-1)
        return flat[..., places.argsort()].unflatten(-1, square)

    def spread(self, parts: list[Tensor]) -> Tensor:
        """The same."""
        return self.inverse(parts)


@dataclass(frozen=True)
class Skew:
    """Z_n on both axes of (..., n, n): z[i, k] = y[i, i + k]; the group shifts i, and k numbers copies."""

    size: int

    exact = True

    @property
    def outputs(self) -> tuple[Output, ...]:
        """(..., i, k)"""
        return (Output((), (OutAxis("open", self.size, slot=0), OutAxis("copy", self.size))),)

    def forward(self, x: Tensor) -> list[Tensor]:
        """y[i, (i + k) mod n]"""
        i = torch.arange(self.size, device=x.device)
        return [x[..., i[:, None], (i[:, None] + i) % self.size]]

    def inverse(self, parts: list[Tensor]) -> Tensor:
        """z[i, (j - i) mod n]"""
        i = torch.arange(self.size, device=parts[0].device)
        return parts[0][..., i[:, None], (i - i[:, None]) % self.size]

    def spread(self, parts: list[Tensor]) -> Tensor:
        """The same."""
        return self.inverse(parts)


@dataclass(frozen=True)
class Cyclic:
    """Z_n on one axis: the unitary Fourier transform.

    Of a real axis: frequency 0 (trivial), n / 2 for even n (real), and sqrt(2) times those between (complex, one kind
    each, of real dimension 2), which keeps norms.  Of a complex axis: all frequencies.
    """

    size: int
    complex: bool

    exact = False

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The trivial part, the alternating part (real axis, even n), the frequencies."""
        n = self.size
        if self.complex:
            between = Output(((0, "w*"),), (OutAxis("batch", n - 1),))
            return (Output(()), between) if n > 1 else (Output(()),)
        kinds = [Output(())]
        if n % 2 == 0:
            kinds.append(Output(((0, "-"),)))
        if n > 2:
            kinds.append(Output(((0, "w"),), (OutAxis("batch", (n - 1) // 2),), 2, complexifies=True))
        return tuple(kinds)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(..., n) -> (...), (...), (..., (n - 1) // 2)"""
        n = self.size
        if self.complex:
            waves = torch.fft.fft(x, norm="ortho")
            return [waves[..., 0], waves[..., 1:]][: len(self.outputs)]
        waves = torch.fft.rfft(x, norm="ortho")
        parts = [waves[..., 0].real]
        if n % 2 == 0:
            parts.append(waves[..., n // 2].real)
        if n > 2:
            parts.append(math.sqrt(2) * waves[..., 1 : (n + 1) // 2])
        return parts

    def inverse(self, parts: list[Tensor]) -> Tensor:
        """The inverse transform."""
        n = self.size
        if self.complex:
            waves = torch.cat([parts[0].unsqueeze(-1), *parts[1:]], dim=-1)
            return torch.fft.ifft(waves, norm="ortho")
        zero = torch.zeros_like(parts[0])
        half = [torch.complex(parts[0], zero).unsqueeze(-1)]
        if n > 2:
            half.append(parts[-1] / math.sqrt(2))
        if n % 2 == 0:
            half.append(torch.complex(parts[1], zero).unsqueeze(-1))
        return torch.fft.irfft(torch.cat(half, dim=-1), n=n, norm="ortho")

    def spread(self, parts: list[Tensor]) -> Tensor:
        """The mean over the n dimensions."""
        t = parts[0]
        for part, output in zip(parts[1:], self.outputs[1:]):
            t = t + (part * output.dimension).sum(-1) if output.axes else t + part
        return (t / self.size).unsqueeze(-1).expand(*t.shape, self.size)


@dataclass(frozen=True)
class Planes:
    """U(1) on every plane of (..., n): z = x + i y, one kind for each plane.

    A real axis becomes complex.  A complex axis, on which another such group acts already, falls into
    (x + i y) / sqrt(2) and (x - i y) / sqrt(2), which are different kinds.
    """

    size: int
    pairing: str
    complex: bool

    exact = False

    @property
    def outputs(self) -> tuple[Output, ...]:
        """z, or z and z*."""
        planes = (OutAxis("batch", self.size // 2),)
        if self.complex:
            return tuple(Output(((0, label),), planes) for label in ("z", "z*"))
        return (Output(((0, "z"),), planes, 2, complexifies=True),)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(..., n) -> (..., n / 2)"""
        a, b = self._pairs(x)
        if self.complex:
            return [(a + 1j * b) / math.sqrt(2), (a - 1j * b) / math.sqrt(2)]
        return [torch.complex(a, b)]

    def inverse(self, parts: list[Tensor]) -> Tensor:
        """Real and imaginary parts, or their complex analogue."""
        if self.complex:
            plus, minus = parts
            return self._join((plus + minus) / math.sqrt(2), (plus - minus) / (1j * math.sqrt(2)))
        return self._join(parts[0].real, parts[0].imag)

    def spread(self, parts: list[Tensor]) -> Tensor:
        """Equal on both coordinates of a plane."""
        t = 0.5 * (parts[0] + parts[1]) if self.complex else parts[0]
        return self._join(t, t)

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = self.size // 2
        if self.pairing == "half":
            return x[..., :half], x[..., half:]
        return x[..., 0::2], x[..., 1::2]

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        if self.pairing == "half":
            return torch.cat([a, b], dim=-1)
        return torch.stack([a, b], dim=-1).flatten(-2)
