"""What the groups of an element do to one parameter: block by block, inner copies first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symgeo.groups import Group
from symgeo.symmetry.blocks import Block
from symgeo.symmetry.layout import Layout, assemble, split


@dataclass(frozen=True)
class LinearPart:
    """Layouts, groups, and for every parameter the (name, block) pairs in the order in which they act."""

    layouts: Mapping[str, Layout]
    groups: Mapping[str, Group]
    schedule: Mapping[str, Sequence[tuple[str, Block]]]

    def act(self, g: Mapping[str, Tensor], parameter: str, x: Tensor) -> Tensor:
        """The parameter moved by the groups of g."""
        steps = self._steps(g, parameter)
        if not steps:
            return x
        blocks = split(self.layouts[parameter], _at_least_single(x))
        for name, block in steps:
            rows = block.rows(blocks[block.index])
            blocks[block.index] = block.restore(self.groups[name].act(g[name], rows, dual=block.dual))
        return assemble(self.layouts[parameter], blocks).to(x.dtype)

    def vertical(self, xi: Mapping[str, Tensor], parameter: str, x: Tensor) -> Tensor:
        """The velocity of `act` along exp(t xi)."""
        steps = self._steps(xi, parameter)
        if not steps:
            return torch.zeros_like(x)
        blocks = split(self.layouts[parameter], _at_least_single(x))
        moved = [torch.zeros_like(block) for block in blocks]
        for name, block in steps:
            rows = block.rows(blocks[block.index])
            velocity = self.groups[name].vertical(xi[name], rows, dual=block.dual)
            moved[block.index] = moved[block.index] + block.restore(velocity)
        return assemble(self.layouts[parameter], moved).to(x.dtype)

    def _steps(self, g: Mapping[str, Tensor], parameter: str) -> list[tuple[str, Block]]:
        return [(name, block) for name, block in self.schedule.get(parameter, []) if name in g]


def _at_least_single(x: Tensor) -> Tensor:
    """Half precision is computed in single and rounded once."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
