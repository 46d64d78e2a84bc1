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

        c <- e^s c + e^(s/2) t,   a . t = 0,     W <- W - W (c' - c) a^T / (a . c')

    so that ``W' c' = W c`` and ``W' (g * y) = W (g * y)`` (derived here).  Maps with a bias take ``W (c' - c)`` back
    with that, and writers to the stream that the norm stands on take back ``c' - c`` itself.

    Coordinates are s and t less its entry where |a| is largest, which ``a . t = 0`` gives.  Needs ``a . c`` not 0.
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
        """The bias moved, and everything that takes it back."""
        a, shift = annihilator(params[self.gain].to(t.dtype)), params[self.shift].to(t.dtype)
        after = t[0].exp() * shift + (0.5 * t[0]).exp() * self._tangent(t[1:], a)
        return {self.shift: after} | self._taken_back(after - shift, a / (a @ after), params, keep=True)

    def vertical(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """s c + t, and what takes it back."""
        a, shift = annihilator(params[self.gain].to(t.dtype)), params[self.shift].to(t.dtype)
        step = t[0] * shift + self._tangent(t[1:], a)
        return {self.shift: step} | self._taken_back(step, a / (a @ shift), params, keep=False)

    def _tangent(self, t: Tensor, a: Tensor) -> Tensor:
        """The vector with a . t = 0 whose other entries are given; its entry at the largest |a| is solved for."""
        n = a.shape[0]
        place = torch.nn.functional.one_hot(a.abs().argmax(), n).to(a)
        others = torch.arange(n - 1, device=a.device)
        others = others + (others >= a.abs().argmax())
        full = torch.zeros_like(a).index_put((others,), t)
        return full - place * (a @ full) / (a * place).sum()

    def _taken_back(self, change: Tensor, direction: Tensor, params: Params, keep: bool) -> dict[str, Tensor]:
        steps: dict[str, Tensor] = {}
        for reader in self.readers:
            image = reader.product(change, params)
            own = reader.takes_back(image, params) if reader.absorbs else {
                reader.weight: reader.embed(-torch.outer(image, direction), params[reader.weight])}
            steps |= {name: steps[name] + x if name in steps else x for name, x in own.items()}
        for span in self.writers:
            step = span.embed(-change, params[span.parameter])
            steps[span.parameter] = steps[span.parameter] + step if span.parameter in steps else step
        return {name: params[name] + x for name, x in steps.items()} if keep else steps
