"""Flows of the channels between two affine maps: scalings about another point than zero, and translations.

They are what batch norms in evaluation mode leave: constants that shift and scale every channel by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from symgeo.errors import SymmetryError
from symgeo.symmetry.flow import Flow, Shear, unique
from symgeo.symmetry.reader import Params, Rule, Shapes

#: one number for every channel
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Port:
    """How an affine map meets the channels before or behind it.

    axis: that of the weight along which the channels run, each of them so many consecutive entries as fit (pixels
    of a flattened image). diagonal: it multiplies every channel by itself (a gain, a depthwise kernel). factor: what
    multiplies the channels before they come here.
    """

    weight: str
    bias: str | None
    axis: int
    diagonal: bool = False
    factor: Numbers | None = None

    def renamed(self, rule: Rule) -> Port:
        """The same map under other names."""
        return replace(self, weight=rule(self.weight), bias=rule(self.bias) if self.bias else None)

    def product(self, x: Tensor, params: Params) -> Tensor:
        """W (f x) for an image that is the constant x_c on every channel c."""
        x = x if self.factor is None else x * x.new_tensor(self.factor)
        weight = params[self.weight].to(x.dtype)
        if self.diagonal:
            return weight.reshape(len(x), -1).sum(-1) * x
        return weight.reshape(len(weight), len(x), -1).sum(-1) @ x

    def scaled(self, factors: Tensor, params: Params) -> Tensor:
        """The weight with every channel multiplied by its factor."""
        weight = params[self.weight].to(factors.dtype).movedim(self.axis, -1)
        pixels = weight.shape[-1] // len(factors)
        return (weight * factors.repeat_interleave(pixels)).movedim(-1, self.axis)


@dataclass(frozen=True)
class ChannelScale(Flow):
    r"""Scalings of channels about fixed points, y - a -> e^t (y - a) behind one map and (z - c) -> e^kt (z - c) before
    the next one:

        W <- e^t W,   b <- a + e^t (b - a);        V <- V e^-kt,   d <- d + V (1 - e^-kt) c

    W, b write and V, d read. Between them stands what multiplies z - c by e^kt: positively homogeneous maps of
    degree k, and constants z = (y - m) / s, for which a = m belongs to c = 0, and a = 0 to c = -m / s.
    """

    writer: Port
    reader: Port
    behind: Numbers | None = None
    before: Numbers | None = None
    degree: int = 1

    @property
    def moves(self) -> tuple[str, ...]:
        """Weight and bias of the writer, the weight and, unless its fixed points are 0, the bias of the reader."""
        biases = [self.writer.bias, self.reader.bias if self.before else None]
        return unique([self.writer.weight, self.reader.weight, *(name for name in biases if name)])

    @property
    def reads(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def renamed(self, rule: Rule) -> ChannelScale:
        """The same flow with every parameter name replaced."""
        return replace(self, writer=self.writer.renamed(rule), reader=self.reader.renamed(rule))

    def dimension(self, shapes: Shapes) -> int:
        """The number of channels."""
        size = shapes[self.writer.weight][self.writer.axis]
        for numbers in (self.behind, self.before):
            _check_length(self, self.writer, size, numbers)
        return size

    def act(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """Everything scaled."""
        grown, back = t.exp(), (-self.degree * t).exp()
        moved = {self.writer.weight: self.writer.scaled(grown, params)}
        if self.writer.bias:
            a, b = self._point(self.behind, t), params[self.writer.bias].to(t.dtype)
            moved[self.writer.bias] = a + grown * (b - a)
        moved[self.reader.weight] = self.reader.scaled(back, params)
        if self.reader.bias and self.before:
            change = self.reader.product((1 - back) * self._point(self.before, t), params)
            moved[self.reader.bias] = params[self.reader.bias].to(t.dtype) + change
        return moved

    def vertical(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """t W, t (b - a), -k t V, V k t c."""
        steps = {self.writer.weight: self.writer.scaled(t, params)}
        if self.writer.bias:
            steps[self.writer.bias] = t * (params[self.writer.bias].to(t.dtype) - self._point(self.behind, t))
        steps[self.reader.weight] = -self.degree * self.reader.scaled(t, params)
        if self.reader.bias and self.before:
            steps[self.reader.bias] = self.reader.product(self.degree * t * self._point(self.before, t), params)
        return steps

    @staticmethod
    def _point(numbers: Numbers | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if numbers is None else like.new_tensor(numbers)


@dataclass(frozen=True)
class ChannelShift(Shear):
    """A translation of channels that a map behind takes back:

        b += t,   d -= V f t

    b, a bias, is added to the channels, of which nothing but constant factors f and maps that keep constants (pooling)
    stands before the reader V, d. If it has no bias, the next one behind it takes the change back, and so on.
    """

    source: str
    through: tuple[Port, ...]

    def __post_init__(self) -> None:
        if not self.through or self.through[-1].bias is None or any(port.bias for port in self.through[:-1]):
            raise SymmetryError(f"ChannelShift of {self.source!r}: needed maps of which the last one alone has a bias")

    @property
    def moves(self) -> tuple[str, ...]:
        """The two biases."""
        return unique([self.source, *(port.bias for port in self.through if port.bias)])

    @property
    def reads(self) -> tuple[str, ...]:
        """The weights between them."""
        return unique(port.weight for port in self.through)

    def renamed(self, rule: Rule) -> ChannelShift:
        """The same flow with every parameter name replaced."""
        return ChannelShift(rule(self.source), tuple(port.renamed(rule) for port in self.through))

    def dimension(self, shapes: Shapes) -> int:
        """The number of channels."""
        _check_length(self, self.through[0], shapes[self.source][0], self.through[0].factor)
        return shapes[self.source][0]

    def displacement(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """+t and -V f t."""
        change = t
        for port in self.through:
            change = port.product(change, params)
        return {self.source: t, str(self.through[-1].bias): -change}


def _check_length(flow: Flow, port: Port, needed: int, numbers: Numbers | None) -> None:
    if numbers is not None and len(numbers) != needed:
        raise SymmetryError(
            f"{type(flow).__name__} at {port.weight!r}: {len(numbers)} constants for {needed} channels"
        )
