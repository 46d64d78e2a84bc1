"""What flows are made of: the slices of parameters that they move, and the affine maps that read those."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Rule = Callable[[str], str]


@dataclass(frozen=True)
class Span:
    """A slice of the last axis of a parameter, the same for all indices of the other axes.

    The axis is cut in proportion to `parts`, and `part` is the number of the slice: `Span("c_attn.bias", 2,
    (1, 1, 1))` is the last third. With `groups`, each of so many equal pieces of the axis is cut like that, and the
    slices of all of them are one (queries, keys and values interleaved by head). What is added to a span is
    constant along the other axes; with `rows`, only at these indices (from, to) of the axis before.
    """

    parameter: str
    part: int = 0
    parts: tuple[int, ...] = (1,)
    rows: tuple[int, int | None] | None = None
    groups: int = 1

    def renamed(self, rule: Rule) -> Span:
        """The same slice of another parameter."""
        return replace(self, parameter=rule(self.parameter))

    def size(self, shapes: Shapes) -> int:
        """Its length."""
        return shapes[self.parameter][-1] * self.parts[self.part] // sum(self.parts)

    def embed(self, t: Tensor, like: Tensor) -> Tensor:
        """The tensor of the shape of `like` that is t on this slice and 0 elsewhere."""
        unit = like.shape[-1] // (self.groups * sum(self.parts))
        before, after = sum(self.parts[: self.part]) * unit, sum(self.parts[self.part + 1 :]) * unit
        pieces = t.reshape(self.groups, self.parts[self.part] * unit)
        filled = torch.nn.functional.pad(pieces, (before, after)).reshape(-1).expand(like.shape)
        if self.rows is None:
            return filled
        inside = torch.zeros(like.shape[-2], 1, dtype=t.dtype, device=t.device)
        inside[slice(*self.rows)] = 1
        return filled * inside


@dataclass(frozen=True)
class Reader:
    """An affine map y = W x + b that reads what a flow moves, and what takes a constant change of y back:

    its bias; or nothing, where a constant change does not matter (`free`: keys, which softmax compares); or the map
    `then`, which alone reads y and has means of its own (values, whose change the output bias takes back).

    transposed: the weight is stored (in, out). groups, repeat: x is the concatenation of groups, each repeated
    so many times one after the other, as the values of grouped queries are. part, parts: W is one of several
    consecutive slices of the outputs of the weight, of these relative sizes.
    """

    weight: str
    bias: Span | None
    transposed: bool = False
    groups: int = 1
    repeat: int = 1
    free: bool = False
    then: Reader | None = None
    part: int = 0
    parts: tuple[int, ...] = (1,)

    @property
    def absorbs(self) -> bool:
        """Whether a constant change of its output can be taken back."""
        return self.bias is not None or self.free or (self.then is not None and self.then.absorbs)

    @property
    def bare(self) -> Reader:
        """The map without what takes a change back."""
        return replace(self, bias=None, free=False, then=None)

    @property
    def moves(self) -> tuple[str, ...]:
        """The parameter that takes a change back."""
        if self.bias:
            return (self.bias.parameter,)
        return self.then.moves if self.then and not self.free else ()

    @property
    def reads(self) -> tuple[str, ...]:
        """The weights through which a change goes before it is taken back, this one first."""
        return (self.weight, *(self.then.reads if self.then and not self.bias and not self.free else ()))

    def renamed(self, rule: Rule) -> Reader:
        """The same map under other names."""
        return replace(
            self, weight=rule(self.weight), bias=self.bias.renamed(rule) if self.bias else None,
            then=self.then.renamed(rule) if self.then else None,
        )

    def sizes(self, shapes: Shapes) -> tuple[int, int]:
        """(outputs, inputs), a repeated input counted once."""
        rows, columns = shapes[self.weight]
        outputs, inputs = (columns, rows) if self.transposed else (rows, columns)
        return outputs * self.parts[self.part] // sum(self.parts), inputs // self.repeat

    def product(self, t: Tensor, params: Params) -> Tensor:
        """W t."""
        weight = params[self.weight].to(t.dtype)
        x = t.reshape(self.groups, 1, -1).expand(-1, self.repeat, -1).reshape(-1)
        return ((weight.mT if self.transposed else weight) @ x)[self._slice(weight)]

    def embed(self, rows: Tensor, like: Tensor) -> Tensor:
        """What changes of W (outputs, inputs) are as a change of the weight."""
        here, total = self._slice(like), like.shape[1 if self.transposed else 0]
        whole = torch.nn.functional.pad(rows, (0, 0, here.start, total - here.stop))
        return whole.mT if self.transposed else whole

    def _slice(self, weight: Tensor) -> slice:
        unit = weight.shape[1 if self.transposed else 0] // sum(self.parts)
        return slice(sum(self.parts[: self.part]) * unit, sum(self.parts[: self.part + 1]) * unit)

    def takes_back(self, change: Tensor, params: Params) -> dict[str, Tensor]:
        """The steps that undo a constant `change` (outputs) of y."""
        if self.bias:
            return {self.bias.parameter: self.bias.embed(-change, params[self.bias.parameter])}
        if self.free or self.then is None:
            return {}
        return self.then.takes_back(self.then.product(change, params), params)
