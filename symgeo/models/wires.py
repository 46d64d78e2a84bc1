"""What the channels between two affine maps allow: how scalings, signs and translations pass what stands between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symgeo.models.chain import Affine, Constant, Cut, Fixed, Item, Normaliser
from symgeo.symmetry.channels import Numbers

#: fixed points closer than this are the same
_SAME = 1e-12


@dataclass(frozen=True)
class Wire:
    """The maps of channels y -> y' behind the writer that arrive as maps z -> z' before the reader.

    degree : scalings by s > 0 arrive as s^degree (0: they do not), about the points ``behind`` and ``before`` (None: 0)
    shifted, factor : translations by t arrive as factor t (None: t)
    parity : signs arrive (1), vanish (-1), or do not pass (0);  mixes : all linear maps pass as they are
    """

    degree: int = 0
    behind: Numbers | None = None
    before: Numbers | None = None
    shifted: bool = False
    factor: Numbers | None = None
    parity: int = 0
    mixes: bool = False


def wire(writer: Affine, between: Sequence[Item], reader: Affine) -> Wire:
    """What passes from a writer to a reader."""
    if any(isinstance(item, Cut) for item in between):
        return Wire()
    parity = _parity(between)
    if any(isinstance(item, Normaliser) for item in between):
        return Wire(parity=parity)
    fixed = [item for item in between if isinstance(item, Fixed)]
    constant = [item for item in between if isinstance(item, Constant)]
    factor = torch.ones(writer.channels[1], dtype=torch.float64)
    for item in constant:
        factor = factor * torch.tensor(item.scale, dtype=torch.float64)
    return Wire(
        *_scaling(writer, between, reader),
        shifted=all(item.shifts for item in fixed),
        factor=tuple(factor.tolist()) if constant else None,
        parity=parity,
        mixes=not constant and all(item.mixes for item in fixed),
    )


def _scaling(
    writer: Affine, between: Sequence[Item], reader: Affine
) -> tuple[int, Numbers | None, Numbers | None]:
    """The degree at which scalings pass, and their fixed points at both ends.

    A map that does not commute with translations, a writer or a reader without a bias: each wants the fixed point to
    be 0 where it stands.
    """
    here = _Points(writer.channels[1], writer.bias is None)
    degree = 1
    for item in between:
        if isinstance(item, Constant):
            here.pass_constant(item)
        elif isinstance(item, Fixed):
            degree *= item.degree
            if not item.shifts and not here.restart():
                return 0, None, None
    if degree == 0 or (not reader.absorbs and not here.require_zero()):
        return 0, None, None
    return degree, *here.ends()


class _Points:
    """The fixed point of a scaling along a wire: y in the coordinates of the last beginning, a y + b here."""

    def __init__(self, channels: int, zero: bool) -> None:
        self._zeros = torch.zeros(channels, dtype=torch.float64)
        self._point: Tensor | None = self._zeros if zero else None
        self._behind: Tensor | None = None
        self._begin()

    def _begin(self) -> None:
        self._scale, self._offset = self._zeros + 1, self._zeros

    def pass_constant(self, item: Constant) -> None:
        """Behind scale y + offset."""
        scale = torch.tensor(item.scale, dtype=torch.float64)
        self._scale, self._offset = self._scale * scale, self._offset * scale + self._zeros.new_tensor(item.offset)

    def require_zero(self) -> bool:
        """Whether the fixed point can be 0 here."""
        zero = -self._offset / self._scale
        if self._point is None:
            self._point = zero
        return bool(((self._point - zero).abs() <= _SAME * (1 + zero.abs())).all())

    def restart(self) -> bool:
        """A map that needs it to be 0 on both sides; whether it can be."""
        possible = self.require_zero()
        self._behind = self._point if self._behind is None else self._behind
        self._point = self._zeros
        self._begin()
        return possible

    def ends(self) -> tuple[Numbers | None, Numbers | None]:
        """The fixed points behind the writer and before the reader; None for 0."""
        if self._point is None:
            self.require_zero()
        assert self._point is not None
        behind = self._point if self._behind is None else self._behind
        return _numbers(behind), _numbers(self._scale * self._point + self._offset)


def _numbers(x: Tensor) -> Numbers | None:
    return tuple(x.tolist()) if bool((x.abs() > _SAME).any()) else None


def _parity(between: Sequence[Item]) -> int:
    """Whether signs of channels arrive (1), vanish on the way (-1) or change what arrives (0)."""
    for item in between:
        if isinstance(item, Fixed) and item.parity != 1:
            return item.parity
        if (isinstance(item, Normaliser) and item.centred) or (isinstance(item, Constant) and any(item.offset)):
            return 0
    return 1
