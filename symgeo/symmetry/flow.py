"""Compensated directions: what moves one parameter while others take the change back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from symgeo.errors import SymmetryError
from symgeo.symmetry.reader import Params, Reader, Rule, Shapes, Span

K = TypeVar("K", Span, Reader)


class Flow(ABC):
    """What moves parameters along directions that depend on other parameters: a family of maps t -> act(t, .), t in
    R^n, with act(0, .) the identity and act(-t, .) the inverse of act(t, .).

    It reads only parameters that it does not move.  Its vertical field is the derivative of act(s t, p) at s = 0.
    """

    @property
    @abstractmethod
    def moves(self) -> tuple[str, ...]:
        """The parameters it moves."""

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """The parameters on which its directions depend; none of them is moved."""

    @abstractmethod
    def renamed(self, rule: Rule) -> Flow:
        """The same flow with every parameter name replaced."""

    @abstractmethod
    def dimension(self, shapes: Shapes) -> int:
        """The number n of its coordinates. Raises SymmetryError if it does not fit the shapes."""

    @abstractmethod
    def act(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """Every parameter that it moves, moved by the coordinates t (n), in their precision."""

    @abstractmethod
    def vertical(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """The velocity of act(s t, params) at s = 0 for every parameter that it moves, linear in t."""

    def rank(self, params: Params) -> int:
        """The number of independent directions at params; all of them unless a leaf knows better."""
        return self.dimension({name: tuple(x.shape) for name, x in params.items()})


class Shear(Flow):
    """An abelian group R^n of shears,

        p -> p + A(p) t

    where A(p) has full rank and reads only parameters that the flow does not move. So elements add up, and the
    vertical field of t is A(p) t itself.
    """

    @abstractmethod
    def displacement(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """A(p) t for every parameter it moves, linear in the coordinates t (n), in their precision."""

    def act(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """p + A(p) t"""
        return {name: params[name] + step for name, step in self.displacement(t, params).items()}

    def vertical(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """A(p) t"""
        return self.displacement(t, params)


@dataclass(frozen=True)
class Compensation(Shear):
    """A translation of biases that their readers take back:

        s += t   for every source;   b -= W t   for every reader;   r -= t   for every writer.

    The biases of values against the output bias of attention; the bias of a norm against those of the maps
    that read it and, where it is passed on by a residual connection, that of the next map that writes there;
    with sources and writers alone, what two embeddings exchange.

    within: "all" translations; "mean_free" ones, whose entries sum to 0 (the first n - 1 are the coordinates), where
    those by a constant are counted elsewhere; or those by a constant, "mean".
    """

    sources: tuple[Span, ...]
    readers: tuple[Reader, ...] = ()
    writers: tuple[Span, ...] = ()
    within: str = "all"

    def __post_init__(self) -> None:
        for reader in self.readers:
            if not reader.absorbs:
                raise SymmetryError(f"Compensation: the map {reader.weight!r} has no bias that could compensate")
        _check_apart(self)

    @property
    def moves(self) -> tuple[str, ...]:
        """Sources, the biases of readers, writers."""
        spans = [*self.sources, *self.writers]
        return unique([*(span.parameter for span in spans), *(n for reader in self.readers for n in reader.moves)])

    @property
    def reads(self) -> tuple[str, ...]:
        """The weights of readers."""
        return unique(weight for reader in self.readers for weight in reader.reads)

    def renamed(self, rule: Rule) -> Compensation:
        """The same flow with every parameter name replaced."""
        return replace(
            self, sources=_renamed(self.sources, rule), readers=_renamed(self.readers, rule),
            writers=_renamed(self.writers, rule),
        )

    def dimension(self, shapes: Shapes) -> int:
        """The length of a source."""
        size = self.sources[0].size(shapes)
        for span in (*self.sources, *self.writers):
            check_length(self, span.parameter, span.size(shapes), size)
        for reader in self.readers:
            outputs, inputs = reader.sizes(shapes)
            check_length(self, reader.weight, inputs, size)
            _check_bias(self, reader, outputs, shapes)
        return {"all": size, "mean_free": size - 1, "mean": 1}[self.within]

    def coordinates(self, translation: Tensor) -> Tensor:
        """Those of a translation, or of the closest one that it can be."""
        if self.within == "mean_free":
            return (translation - translation.mean())[:-1]
        return translation.mean().reshape(1) if self.within == "mean" else translation

    def displacement(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """+t, -W t and -t."""
        if self.within == "mean_free":
            t = torch.cat([t, -t.sum().unsqueeze(0)])
        elif self.within == "mean":
            t = t.expand(self.sources[0].size({name: tuple(x.shape) for name, x in params.items()}))
        spans = [(span, t) for span in self.sources] + [(span, -t) for span in self.writers]
        steps = [{span.parameter: span.embed(step, params[span.parameter])} for span, step in spans]
        steps += [reader.takes_back(reader.product(t, params), params) for reader in self.readers]
        moved: dict[str, Tensor] = {}
        for step in steps:
            moved |= {name: moved[name] + x if name in moved else x for name, x in step.items()}
        return moved


@dataclass(frozen=True)
class RowFreedom(Shear):
    """What a map W x + b may add to its rows when it reads a LayerNorm, x = g * y + c with sum(y) = 0:

        W += u a^T,   b -= u (a . c),   a = min|g| / (g sqrt(n))   (u: one number for each output, n: the width)

    since a . (g * y) is a multiple of sum(y) = 0; |a| <= 1. Where gains are zero, a is the indicator of the first.
    """

    reader: Reader
    gain: str
    shift: str | None = None

    def __post_init__(self) -> None:
        if self.shift is not None and not self.reader.absorbs:
            raise SymmetryError(
                f"RowFreedom: the norm has the bias {self.shift!r}, but the map {self.reader.weight!r} has none"
            )
        _check_apart(self)

    @property
    def moves(self) -> tuple[str, ...]:
        """The weight and, if the norm has a bias, the bias of the map."""
        return (self.reader.weight, *(self.reader.moves if self.shift else ()))

    @property
    def reads(self) -> tuple[str, ...]:
        """The norm, and the weights through which a change of the output goes before it is taken back."""
        return (self.gain, *((self.shift, *self.reader.reads[1:]) if self.shift else ()))

    def renamed(self, rule: Rule) -> RowFreedom:
        """The same flow with every parameter name replaced."""
        return RowFreedom(self.reader.renamed(rule), rule(self.gain), rule(self.shift) if self.shift else None)

    def dimension(self, shapes: Shapes) -> int:
        """The number of outputs of the map."""
        outputs, inputs = self.reader.sizes(shapes)
        check_length(self, self.gain, shapes[self.gain][-1], inputs)
        if self.shift:
            check_length(self, self.shift, shapes[self.shift][-1], inputs)
            _check_bias(self, self.reader, outputs, shapes)
        return outputs

    def displacement(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """u a^T and -u (a . c)."""
        a = annihilator(params[self.gain].to(t.dtype))
        moved = {self.reader.weight: self.reader.embed(torch.outer(t, a), params[self.reader.weight])}
        if self.shift:
            moved |= self.reader.takes_back(t * (a @ params[self.shift].to(t.dtype)), params)
        return moved


@dataclass(frozen=True)
class MeanWrite(Shear):
    """The mean direction of what a map writes through a gain to a stream whose readers remove the mean:

        W += a t^T,   b += a t_0,   a = min|g| / (g sqrt(n))   (t: one number for each input of W, n: the width)

    since g * a is constant. Where gains are zero, a is the indicator of the first.
    """

    writer: Reader
    gain: str

    @property
    def moves(self) -> tuple[str, ...]:
        """The weight and the bias of the map."""
        return (self.writer.weight, *self.writer.moves)

    @property
    def reads(self) -> tuple[str, ...]:
        """The gain."""
        return (self.gain,)

    def renamed(self, rule: Rule) -> MeanWrite:
        """The same flow with every parameter name replaced."""
        return MeanWrite(self.writer.renamed(rule), rule(self.gain))

    def dimension(self, shapes: Shapes) -> int:
        """The number of inputs of the map, and one more for its bias."""
        outputs, inputs = self.writer.sizes(shapes)
        check_length(self, self.gain, shapes[self.gain][-1], outputs)
        return inputs + (1 if self.writer.bias else 0)

    def displacement(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """a t^T and a t_0."""
        a = annihilator(params[self.gain].to(t.dtype))
        row, bias = (t[1:], self.writer.bias) if self.writer.bias else (t, None)
        moved = {self.writer.weight: self.writer.embed(torch.outer(a, row), params[self.writer.weight])}
        return moved | ({bias.parameter: bias.embed(a * t[0], params[bias.parameter])} if bias else {})


def annihilator(gain: Tensor) -> Tensor:
    """The direction a with a . (gain * y) = 0 for all y of mean zero."""
    zero = gain == 0
    first = zero & (zero.cumsum(0) == 1)
    balanced = gain.abs().min() / (torch.where(zero, 1.0, gain) * gain.shape[-1] ** 0.5)
    return torch.where(zero.any(), first.to(gain.dtype), balanced)


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """The names in order, each once."""
    return tuple(dict.fromkeys(names))


def _renamed(parts: tuple[K, ...], rule: Rule) -> tuple[K, ...]:
    return tuple(part.renamed(rule) for part in parts)


def _check_apart(flow: Flow) -> None:
    both = sorted(set(flow.moves) & set(flow.reads))
    if both:
        raise SymmetryError(f"{type(flow).__name__}: {both[0]!r} would be moved and read by the same flow")


def _check_bias(flow: Flow, reader: Reader, outputs: int, shapes: Shapes) -> None:
    if reader.bias:
        check_length(flow, reader.bias.parameter, reader.bias.size(shapes), outputs)
    elif reader.then and not reader.free:
        check_length(flow, reader.then.weight, reader.then.sizes(shapes)[1], outputs)
        _check_bias(flow, reader.then, reader.then.sizes(shapes)[0], shapes)


def check_length(flow: Flow, parameter: str, found: int, needed: int) -> None:
    """Raise SymmetryError if a parameter does not have the length that a flow needs."""
    if found != needed:
        raise SymmetryError(f"{type(flow).__name__}: parameter {parameter!r} has length {found}, needed {needed}")
