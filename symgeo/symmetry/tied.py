"""Rows that nothing reads, and what embeddings that are tied to the head exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from symgeo.symmetry.flow import Shear, annihilator, unique
from symgeo.symmetry.reader import Params, Rule, Shapes, Span


@dataclass(frozen=True)
class Unread(Shear):
    """Rows (from, to) of a matrix that no input reaches: anything may be added to them."""

    parameter: str
    rows: tuple[int, int]

    @property
    def moves(self) -> tuple[str, ...]:
        """The matrix."""
        return (self.parameter,)

    @property
    def reads(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def renamed(self, rule: Rule) -> Unread:
        """The same rows of another parameter."""
        return Unread(rule(self.parameter), self.rows)

    def dimension(self, shapes: Shapes) -> int:
        """The numbers in these rows."""
        return (self.rows[1] - self.rows[0]) * shapes[self.parameter][-1]

    def displacement(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """t in these rows, 0 elsewhere."""
        height, width = params[self.parameter].shape
        first, last = self.rows
        return {self.parameter: torch.nn.functional.pad(t.reshape(last - first, width), (0, 0, first, height - last))}


@dataclass(frozen=True)
class TiedExchange(Shear):
    """What token embeddings E that are also the rows of the head, ``E (g * y + c) + b`` with sum(y) = 0, exchange with
    other embeddings P that are added to them at the start:

        E += t 1 a^T,   P -= t 1 a^T,   b -= t (a . c) 1,   a = min|g| / (g sqrt(n))

    one direction, since a . (g * y) = 0 (derived here); where the spans are single rows, in these rows alone.
    """

    tied: Span
    other: Span
    gain: str
    shift: str | None
    bias: str

    @property
    def moves(self) -> tuple[str, ...]:
        """Both embeddings, and the bias of the head."""
        return unique([self.tied.parameter, self.other.parameter, *([self.bias] if self.shift else [])])

    @property
    def reads(self) -> tuple[str, ...]:
        """The norm before the head."""
        return (self.gain, *([self.shift] if self.shift else []))

    def renamed(self, rule: Rule) -> TiedExchange:
        """The same flow with every parameter name replaced."""
        return TiedExchange(self.tied.renamed(rule), self.other.renamed(rule), rule(self.gain),
                            rule(self.shift) if self.shift else None, rule(self.bias))

    def dimension(self, shapes: Shapes) -> int:
        """1"""
        return 1

    def displacement(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """t a^T on every row, and back."""
        a = annihilator(params[self.gain].to(t.dtype)) * t[0]
        moved = {self.tied.parameter: self.tied.embed(a, params[self.tied.parameter]),
                 self.other.parameter: self.other.embed(-a, params[self.other.parameter])}
        if self.shift:
            inside = torch.zeros_like(params[self.bias], dtype=t.dtype)
            inside[slice(*(self.tied.rows or (0, None)))] = 1
            moved[self.bias] = -inside * (a @ params[self.shift].to(t.dtype))
        return moved
