"""Flows of a whole residual stream: rotations where the gains of norms are free, and gains that are stored off zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt

import torch
from torch import Tensor

from symgeo.symmetry.flow import Flow, unique
from symgeo.symmetry.reader import Params, Rule, Shapes

#: above this width the rank of what is rotated is taken to be full instead of being computed
_LARGE = 512


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter along which the coordinates of a residual stream run.

    gain, offset: the parameter is a map (or the bias of a norm) behind a norm with this gain, stored less `offset`
    (1 where the norm multiplies by 1 + gain); or it writes to the stream through this gain.
    part, parts: only one of several consecutive slices of its first axis, of these relative sizes.
    """

    parameter: str
    index: int
    gain: str | None = None
    offset: float = 0.0
    part: int = 0
    parts: tuple[int, ...] = (1,)

    def renamed(self, rule: Rule) -> Axis:
        """The same axis of another parameter."""
        return replace(self, parameter=rule(self.parameter), gain=rule(self.gain) if self.gain else None)

    def factor(self, params: Params, dtype: torch.dtype) -> Tensor | None:
        """The gain itself."""
        return None if self.gain is None else params[self.gain].to(dtype) + self.offset

    def mapped(self, x: Tensor, change: Callable[[Tensor], Tensor], keep: bool = True) -> Tensor:
        """The parameter ``x`` with ``change``, which acts on its last axis, applied along this axis to this slice;
        the other slices as they are, or 0."""
        unit = x.shape[0] // sum(self.parts)
        pieces = x.split([part * unit for part in self.parts]) if len(self.parts) > 1 else (x,)
        done = [change(piece.movedim(self.index, -1)).movedim(-1, self.index) if i == self.part else
                piece if keep else torch.zeros_like(piece) for i, piece in enumerate(pieces)]
        return torch.cat(done) if len(done) > 1 else done[0]


@dataclass(frozen=True)
class StreamRotation(Flow):
    r"""Rotations R of a residual stream whose norms all have their readers to themselves:

        writers  W <- R W,     readers  W g <- W g R^T,     biases of norms  b / g <- R (b / g)

    with ``g`` the diagonal of the gain before a reader, which stays as it is, since ``norm(R x) = R norm(x)``.
    Norms that remove the mean need R 1 = 1 (``centred``); the rotation then lives in the mean-free part.

    Coordinates are the entries above the diagonal of a skew matrix K, and ``R = (1 - K / 2)^-1 (1 + K / 2)``, the
    Cayley transform (derived here; SliceGPT rotates the folded network, arXiv 2401.15024).
    """

    writers: tuple[Axis, ...]
    readers: tuple[Axis, ...]
    biases: tuple[Axis, ...] = ()
    centred: bool = False

    @property
    def moves(self) -> tuple[str, ...]:
        """Everything that writes to the stream or reads from it, but the gains."""
        return unique(axis.parameter for axis in self._axes())

    @property
    def reads(self) -> tuple[str, ...]:
        """The gains."""
        return unique(axis.gain for axis in self._axes() if axis.gain)

    def renamed(self, rule: Rule) -> StreamRotation:
        """The same flow with every parameter name replaced."""
        return StreamRotation(_renamed(self.writers, rule), _renamed(self.readers, rule), _renamed(self.biases, rule),
                              self.centred)

    def dimension(self, shapes: Shapes) -> int:
        """n (n - 1) / 2, n the width, less 1 for centred norms."""
        n = self._size(shapes)
        return n * (n - 1) // 2

    def rank(self, params: Params) -> int:
        """Less the rotations that leave everything alone, where writers and readers span less than the stream."""
        shapes = {name: tuple(x.shape) for name, x in params.items()}
        n = self._size(shapes)
        rows = [self._rows(axis, params) for axis in (*self.writers, *self.readers) if axis.parameter in params]
        if n > _LARGE or any(x.is_meta for x in rows):
            return self.dimension(shapes)
        stacked = torch.cat(rows)
        stacked = stacked - stacked.mean(1, keepdim=True) if self.centred else stacked
        idle = n - min(n, int(torch.linalg.matrix_rank(stacked)))
        return n * (n - 1) // 2 - idle * (idle - 1) // 2

    def act(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """Everything rotated by the Cayley transform of t."""
        k = self._skew(t)
        one = torch.eye(len(k), dtype=k.dtype, device=k.device)
        r = self._whole(torch.linalg.solve(one - 0.5 * k, one + 0.5 * k), 1.0)
        moved: dict[str, Tensor] = {}
        for axis, change in self._changes(r, params):
            x = moved.get(axis.parameter, params[axis.parameter].to(r.dtype))
            moved[axis.parameter] = axis.mapped(x, change)
        return moved

    def vertical(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """K W, W g K^T g^-1, g K (b / g)."""
        k = self._whole(self._skew(t), 0.0)
        moved: dict[str, Tensor] = {}
        for axis, change in self._changes(k, params):
            step = axis.mapped(params[axis.parameter].to(k.dtype), change, keep=False)
            moved[axis.parameter] = moved[axis.parameter] + step if axis.parameter in moved else step
        return moved

    def reduced(self, rows: Tensor) -> Tensor:
        """Vectors (k, width) of the stream in the coordinates (k, n) that turn: without their mean if centred."""
        return rows @ self._reflection(rows)[:, 1:] if self.centred else rows

    def _axes(self) -> tuple[Axis, ...]:
        return (*self.writers, *self.readers, *self.biases)

    def _size(self, shapes: Shapes) -> int:
        first = self.writers[0]
        return shapes[first.parameter][first.index] - (1 if self.centred else 0)

    def _rows(self, axis: Axis, params: Params) -> Tensor:
        x, gain = params[axis.parameter].double(), axis.factor(params, torch.float64)
        x = x.movedim(axis.index, -1).reshape(-1, x.shape[axis.index])
        return x if gain is None else x * gain  # a slice of a weight spans less; the rest of it counts too

    def _skew(self, t: Tensor) -> Tensor:
        n = (1 + isqrt(1 + 8 * t.shape[-1])) // 2
        upper = torch.triu_indices(n, n, 1, device=t.device)
        k = t.new_zeros(n, n).index_put((upper[0], upper[1]), t)
        return k - k.mT

    def _whole(self, r: Tensor, fixed: float) -> Tensor:
        """A matrix on the mean-free part as one on the stream, with ``fixed`` on the mean: H diag(fixed, r) H with the
        reflection H that maps the first axis to the mean."""
        if not self.centred:
            return r
        n = len(r) + 1
        h = self._reflection(r.new_empty(1, n))
        corner = torch.nn.functional.pad(r, (1, 0, 1, 0))
        corner = corner + fixed * torch.nn.functional.pad(r.new_ones(1, 1), (0, n - 1, 0, n - 1))
        return h @ corner @ h

    def _reflection(self, like: Tensor) -> Tensor:
        """The reflection of the stream (n, n) that maps its first axis to the mean."""
        n = like.shape[-1]
        v = torch.full((n,), -(n**-0.5), dtype=like.dtype, device=like.device)
        v = v + torch.nn.functional.one_hot(torch.zeros((), dtype=torch.int64, device=like.device), n)
        return torch.eye(n, dtype=like.dtype, device=like.device) - 2 * torch.outer(v, v) / (v @ v)

    def _changes(self, r: Tensor, params: Params) -> Iterator[tuple[Axis, Callable[[Tensor], Tensor]]]:
        """Every axis with what a matrix does to vectors along it."""
        for axes, bias in (((*self.writers, *self.readers), False), (self.biases, True)):
            for axis in axes:
                gain = axis.factor(params, r.dtype)
                around = torch.ones((), dtype=r.dtype, device=r.device) if gain is None else 1 / gain if bias else gain
                yield axis, partial(_conjugated, r, around)


def _renamed(axes: tuple[Axis, ...], rule: Rule) -> tuple[Axis, ...]:
    return tuple(axis.renamed(rule) for axis in axes)


def _conjugated(r: Tensor, around: Tensor, x: Tensor) -> Tensor:
    return (x * around) @ r.mT / around


@dataclass(frozen=True)
class OffsetTrade(Flow):
    """The gain of a norm that multiplies by ``offset + gain``, against what it is multiplied with:

        gain + offset <- e^t (gain + offset),     bias <- e^t bias,     readers  W <- W e^-t along the axis,

    and the gains ``against`` it likewise.

    period: coordinates repeat after so many entries (a gain that is the same within each plane of rotary positions);
    against: gains (axes with no gain of their own) that take the factor back, stored with their offsets.
    """

    gain: str
    offset: float
    readers: tuple[Axis, ...] = ()
    against: tuple[Axis, ...] = ()
    period: int = 1
    bias: str | None = None

    @property
    def moves(self) -> tuple[str, ...]:
        """The gain and all that takes its factor back."""
        own = [self.gain, *([self.bias] if self.bias else [])]
        return unique([*own, *(axis.parameter for axis in (*self.readers, *self.against))])

    @property
    def reads(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def renamed(self, rule: Rule) -> OffsetTrade:
        """The same flow with every parameter name replaced."""
        return replace(self, gain=rule(self.gain), readers=_renamed(self.readers, rule),
                       against=_renamed(self.against, rule), bias=rule(self.bias) if self.bias else None)

    def dimension(self, shapes: Shapes) -> int:
        """The length of the gain over the period."""
        return shapes[self.gain][-1] // self.period

    def act(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """The gain multiplied, the readers divided."""
        factor = t.repeat(self.period).exp()
        moved = {self.gain: (params[self.gain].to(t.dtype) + self.offset) * factor - self.offset}
        moved |= {self.bias: params[self.bias].to(t.dtype) * factor} if self.bias else {}
        for axis in self.readers:
            x = moved.get(axis.parameter, params[axis.parameter].to(t.dtype))
            moved[axis.parameter] = axis.mapped(x, lambda x: x / factor)
        for axis in self.against:
            moved[axis.parameter] = (params[axis.parameter].to(t.dtype) + axis.offset) / factor - axis.offset
        return moved

    def vertical(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """(gain + offset) t, -W t."""
        rate = t.repeat(self.period)
        moved = {self.gain: (params[self.gain].to(t.dtype) + self.offset) * rate}
        moved |= {self.bias: params[self.bias].to(t.dtype) * rate} if self.bias else {}
        for axis in self.readers:
            x = params[axis.parameter].to(t.dtype)
            step = axis.mapped(x, lambda x: -x * rate, keep=False)
            moved[axis.parameter] = moved[axis.parameter] + step if axis.parameter in moved else step
        for axis in self.against:
            moved[axis.parameter] = -(params[axis.parameter].to(t.dtype) + axis.offset) * rate
        return moved


@dataclass(frozen=True)
class StreamScale(Flow):
    """One factor on a residual stream whose norms remove it, up to their eps:

        writers + offset <- e^t (writers + offset),     undone <- e^-t undone

    ``undone``: maps that read the stream without a norm, and gain and bias of the last norm where its reader is also a
    writer (tied embeddings).
    """

    writers: tuple[Axis, ...]
    undone: tuple[Axis, ...] = ()

    @property
    def moves(self) -> tuple[str, ...]:
        """Everything that writes to the stream."""
        return unique(axis.parameter for axis in (*self.writers, *self.undone))

    @property
    def reads(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def renamed(self, rule: Rule) -> StreamScale:
        """The same flow with every parameter name replaced."""
        return StreamScale(_renamed(self.writers, rule), _renamed(self.undone, rule))

    def dimension(self, shapes: Shapes) -> int:
        """1"""
        return 1

    def act(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """All writers multiplied."""
        return {axis.parameter: (params[axis.parameter].to(t.dtype) + axis.offset) * (sign * t[0]).exp() - axis.offset
                for axis, sign in self._signed()}

    def vertical(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """t (writers + offset)"""
        return {axis.parameter: (params[axis.parameter].to(t.dtype) + axis.offset) * (sign * t[0])
                for axis, sign in self._signed()}

    def _signed(self) -> list[tuple[Axis, float]]:
        return [*((axis, 1.0) for axis in self.writers), *((axis, -1.0) for axis in self.undone)]
