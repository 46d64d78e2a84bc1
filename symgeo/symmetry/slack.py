"""Freedom of the maps of a linear chain beyond the basis of what lies between them: what narrower ones do not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from manifolds.linalg import gram
from symgeo.errors import SymmetryError
from symgeo.symmetry.flow import RowFreedom, Shear, unique
from symgeo.symmetry.reader import Params, Reader, Rule, Shapes


@dataclass(frozen=True)
class LinearSlack(Shear):
    r"""What one map of a chain ``W_k ... W_1`` may add without a trace, with nothing nonlinear in between:

        W_i += N,   A N B = 0,         A = W_k ... W_(i+1),  B = W_(i-1) ... W_1,
        b_j -= W_j ... W_(i+1) N b,    b: what the biases before it add up to

    With the projections P_A, P_B onto the rows of A and the columns of B, whose ranks r_A, r_B are those of the
    narrowest places there, ``N = T - P_A T P_B`` with T zero in the first r_A rows and r_B columns. Of the first map
    only columns count that are linearly independent of its rows, and of the last one only such rows: all else is what
    GL of the place between two maps does.

    weights: from first to last, (out, in) each; the first one may be a bias, with the constant 1 as its input.
    index: i - 1; before: the biases of the maps before; absorber: b_j, where there are any; behind: j - i.
    """

    weights: tuple[str, ...]
    index: int
    before: tuple[str | None, ...] = ()
    absorber: str | None = None
    behind: int = 0

    def __post_init__(self) -> None:
        if any(self.before) and not self.absorber:
            raise SymmetryError(f"LinearSlack: no bias compensates what {self.weights[self.index]!r} makes of others")

    @property
    def moves(self) -> tuple[str, ...]:
        """The map and the bias that compensates."""
        return (self.weights[self.index], *([self.absorber] if self.absorber else []))

    @property
    def reads(self) -> tuple[str, ...]:
        """The other maps and the biases before this one."""
        others = [name for i, name in enumerate(self.weights) if i != self.index]
        return unique([*others, *(name for name in self.before if name)])

    def renamed(self, rule: Rule) -> LinearSlack:
        """The same flow with every parameter name replaced."""
        return replace(
            self, weights=tuple(map(rule, self.weights)), before=tuple(rule(b) if b else None for b in self.before),
            absorber=rule(self.absorber) if self.absorber else None,
        )

    def dimension(self, shapes: Shapes) -> int:
        """The entries of N less r_A r_B."""
        rows, columns, seen = self._sizes(shapes)
        return rows * columns - prod(seen)

    def displacement(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """N and -W_j ... W_(i+1) N b."""
        own = params[self.weights[self.index]]
        rows, columns, (seen_rows, seen_columns) = self._sizes({name: params[name].shape for name in self.weights})
        top, rest = t.split([seen_rows * (columns - seen_columns), (rows - seen_rows) * columns])
        top = torch.nn.functional.pad(top.reshape(seen_rows, columns - seen_columns), (seen_columns, 0))
        free = torch.cat([top, rest.reshape(rows - seen_rows, columns)])
        m, n = _matrix(own.shape)
        free = torch.nn.functional.pad(free, (n - columns, 0, m - rows, 0))
        seen = _project(free, self._rows(params, t.dtype))
        step = free - _project(seen.mT, self._columns(params, t.dtype)).mT
        moved = {self.weights[self.index]: step.reshape(own.shape)}
        if self.absorber:
            change = step @ self._offset(params, t.dtype)
            for name in self.weights[self.index + 1 : self.index + 1 + self.behind]:
                change = params[name].to(t.dtype) @ change
            moved[self.absorber] = -change
        return moved

    def _sizes(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int, tuple[int, int]]:
        """Rows and columns of N that count, and how many of them the maps around it see."""
        widths = [_matrix(shapes[self.weights[0]])[1], *(shapes[name][0] for name in self.weights)]
        n, m = widths[self.index], widths[self.index + 1]
        first, last = self.index == 0, self.index == len(self.weights) - 1
        basis = min(m, n) if len(shapes[self.weights[self.index]]) == 2 else 0
        rows = m - basis if last else m
        columns = n - basis if first else n
        seen_rows = rows if last else min(widths[self.index + 1 :])
        seen_columns = columns if first else min(widths[: self.index + 1])
        return rows, columns, (seen_rows, seen_columns)

    def _rows(self, params: Params, dtype: torch.dtype) -> Tensor | None:
        """An orthonormal basis of the rows of A: those of the maps up to the narrowest place; None for all."""
        after = [params[name].to(dtype) for name in self.weights[self.index + 1 :]]
        return _basis([x.mT for x in after])

    def _columns(self, params: Params, dtype: torch.dtype) -> Tensor | None:
        """An orthonormal basis of the columns of B; None for all."""
        return _basis([params[name].to(dtype) for name in reversed(self.weights[: self.index])])

    def _offset(self, params: Params, dtype: torch.dtype) -> Tensor:
        """What the biases before add up to."""
        offset = params[self.weights[0]].new_zeros(params[self.weights[0]].shape[1], dtype=dtype)
        for weight, bias in zip(self.weights, self.before):
            offset = params[weight].to(dtype) @ offset
            offset = offset + params[bias].to(dtype) if bias else offset
        return offset


@dataclass(frozen=True)
class RowTrade(Shear):
    r"""What a map W without a bias may add to its rows when it reads a LayerNorm, ``x = g * y + c`` with sum(y) = 0:

        W += u a^T,    c += g * z,    W (g * z) = -u (a . c),    sum(z) = 0

    (u: one number for each output, fewer than the width), a the direction with ``a . (g * y) = 0`` for all such y. Here
    z is the shortest solution; neither ``a . c`` nor W on mean-free vectors, all that is read, changes.
    """

    weight: str
    gain: str
    bias: str

    @property
    def moves(self) -> tuple[str, ...]:
        """The weight, and the bias of the norm."""
        return (self.weight, self.bias)

    @property
    def reads(self) -> tuple[str, ...]:
        """The gain."""
        return (self.gain,)

    def renamed(self, rule: Rule) -> RowTrade:
        """The same flow with every parameter name replaced."""
        return RowTrade(rule(self.weight), rule(self.gain), rule(self.bias))

    def dimension(self, shapes: Shapes) -> int:
        """The number of outputs."""
        outputs, inputs = shapes[self.weight]
        if outputs >= inputs:
            raise SymmetryError(f"RowTrade: {self.weight!r} needs less outputs than inputs, has {outputs} and {inputs}")
        return outputs

    def displacement(self, t: Tensor, params: Params) -> dict[str, Tensor]:
        """u a^T and g * z."""
        weight, gain, bias = (params[name].to(t.dtype) for name in (self.weight, self.gain, self.bias))
        rows = RowFreedom(Reader(self.weight, None), self.gain).displacement(t, params)[self.weight]
        seen = weight * gain
        seen = seen - seen.mean(1, keepdim=True)
        z = seen.mT @ torch.linalg.solve(gram(seen.mT), -rows @ bias)
        return {self.weight: rows, self.bias: gain * z}


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(out, in) of a weight, or of a bias."""
    return shape[0], shape[1] if len(shape) == 2 else 1


def _project(x: Tensor, basis: Tensor | None) -> Tensor:
    return x if basis is None else basis @ (basis.mT @ x)


def _basis(factors: list[Tensor]) -> Tensor | None:
    """An orthonormal basis of the columns of a product, from its narrowest place on; None if that is its beginning."""
    widths = [x.shape[1] for x in factors]
    if not factors or min(widths) >= factors[0].shape[0]:
        return None
    product = factors[0]
    for x in factors[1 : widths.index(min(widths)) + 1]:
        product = product @ x
    return torch.linalg.qr(product).Q
