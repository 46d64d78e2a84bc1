"""The bias of a LayerNorm against maps behind it that have no bias of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from symgeo.symmetry.flow import Flow, annihilator, check_length, unique
from symgeo.symmetry.reader import Params, Reader, Rule, Shapes, Span


@dataclass(frozen=True)
class NormBias(Flow):
    r"""What the bias c of a LayerNorm, ``x = g * y + c`` with sum(y) = 0, may do although not all maps W x that read it
    can take a translation back: with ``a = min|g| / (g sqrt(n))``, for which ``a . (g * y) = 0``,

        c <- T c,     W <- W T^-1,     T = exp(t a^T) = 1 + (e^(a.t) - 1) / (a.t) t a^T

    since T leaves ``g * y`` alone, so that ``x`` becomes ``T x`` (derived here).  Maps with a bias take ``W (T c - c)``
    back with that, and writers to the stream that the norm stands on take back ``T c - c`` itself.
    """

    gain: str
    shift: str
    readers: tuple[Reader, ...]
    writers: tuple[Span, ...] = ()

    @property
    def moves(self) -> tuple[str, ...]:
        """The bias, the weights of maps without one, the biases of the others, and those of writers."""
        own = [name for r in self.readers for name in ((*r.moves,) if r.absorbs else (r.weight,))]
        return unique([self.shift, *own, *(span.parameter for span in self.writers)])

    @property
    def reads(self) -> tuple[str, ...]:
        """The gain, and the weights of maps with a bias."""
        return unique([self.gain, *(name for r in self.readers if r.absorbs for name in r.reads)])

    def renamed(self, rule: Rule) -> NormBias:
        """The same flow with every parameter name replaced."""
        return NormBias(rule(self.gain), rule(self.shift), tuple(r.renamed(rule) for r in self.readers),
                        tuple(span.renamed(rule) for span in self.writers))

    def dimension(self, shapes: Shapes) -> int:
        """The width."""
        width = shapes[self.shift][-1]
        for reader in self.readers:
            check_length(self, reader.weight, reader.sizes(shapes)[1], width)
        return width

    def act(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """T c and W T^-1, and what takes the change of c back."""
        a, shift = annihilator(params[self.gain].to(t.dtype)), params[self.shift].to(t.dtype)
        rate = a @ t
        change = t * (_growth(rate) * (a @ shift))
        steps = self._taken_back(change, -_growth(-rate) * t, a, params)
        return {self.shift: shift + change} | {name: params[name] + x for name, x in steps.items()}

    def vertical(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """t (a . c) and -W t a^T, and what takes t (a . c) back."""
        a = annihilator(params[self.gain].to(t.dtype))
        change = t * (a @ params[self.shift].to(t.dtype))
        return {self.shift: change} | self._taken_back(change, -t, a, params)

    def _taken_back(self, change: Tensor, turn: Tensor, a: Tensor, params: Params) -> dict[str, Tensor]:
        """The steps of everything but the bias, which moves by ``change``; maps without one by ``W turn a^T``."""
        steps: dict[str, Tensor] = {}
        for reader in self.readers:
            own = reader.takes_back(reader.product(change, params), params) if reader.absorbs else {
                reader.weight: reader.embed(torch.outer(reader.product(turn, params), a), params[reader.weight])}
            steps |= {name: steps[name] + x if name in steps else x for name, x in own.items()}
        for span in self.writers:
            step = span.embed(-change, params[span.parameter])
            steps[span.parameter] = steps[span.parameter] + step if span.parameter in steps else step
        return steps


def _growth(rate: Tensor) -> Tensor:
    """``(e^r - 1) / r``, 1 at 0."""
    near = rate.abs() < 1e-8
    safe = torch.where(near, 1.0, rate)
    return torch.where(near, 1 + 0.5 * rate, torch.expm1(safe) / safe)
