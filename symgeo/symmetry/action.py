"""A symmetry bound to the shapes of actual parameters: its elements, and what they do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from symgeo.distributed import refuse_sharded
from symgeo.errors import SymmetryError
from symgeo.groups import Group
from symgeo.symmetry.bind import bind_layouts
from symgeo.symmetry.blocks import Block, chains, find_blocks, inner_first, relabel
from symgeo.symmetry.element import Element
from symgeo.symmetry.elements import Elements
from symgeo.symmetry.expand import Declaration
from symgeo.symmetry.flow import Flow
from symgeo.symmetry.layout import assemble, split
from symgeo.symmetry.linear import LinearPart
from symgeo.symmetry.normaliser import check_normalised
from symgeo.symmetry.shifts import Translation, bind_shift

Params = Mapping[str, Tensor]


class Action:
    """What `Symmetry.bind` returns.

    Attributes
    ----------
    shapes: the shape of every parameter
    sizes: the size of every named factor
    groups: the group of every name that moves something; a glob's matches have their own names, `e[layers.3]`
    copies: the shape of the copies of each group, () for a single element
    declared: the name that the user wrote for each name here, `e[layers.*]`
    layouts: for each declared parameter how it splits into blocks
    shifts: the translations
    flows: the compensated directions; they act last, in this order
    coordinates: the number of coordinates of every shift and flow
    frozen: parameters that nothing here moves
    device, dtype: where and how elements are drawn
    """

    def __init__(self, declaration: Declaration, params: Params) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(x.shape) for name, x in params.items()}
        self.sizes, self.layouts = bind_layouts(
            declaration.tensors, self.shapes, declaration.groups, declaration.sizes
        )
        self.declared = declaration.declared
        self.frozen = frozenset(declaration.frozen)
        chain_of = chains(declaration.groups)
        blocks = find_blocks(self.layouts, declaration.groups, chain_of)
        self.groups: dict[str, Group] = {
            name: group
            for name, group in declaration.groups.items()
            if not any(block.parameter in declaration.frozen for block in blocks[name])
        }
        self._chains = {name: chain_of[name] for name in self.groups}
        self._blocks = {name: blocks[name] for name in self.groups}
        self.copies = {name: tuple(self.sizes[per] for per in chain) for name, chain in self._chains.items()}
        self.shifts: dict[str, Translation] = {
            name: bind_shift(name, patterns, self.shapes, self.layouts, self.sizes)
            for name, patterns in declaration.shifts.items()
            if not patterns.keys() & declaration.frozen
        }
        for name, shift in self.shifts.items():
            check_normalised(name, shift, self.layouts, self.groups, self._blocks)
        self.flows: dict[str, Flow] = {
            name: flow
            for name, flow in declaration.flows.items()
            if not set(flow.moves) & declaration.frozen
        }
        self.coordinates = {name: shift.dimension for name, shift in self.shifts.items()}
        self.coordinates |= {name: flow.dimension(self.shapes) for name, flow in self.flows.items()}
        self._linear = LinearPart(self.layouts, self.groups, inner_first(self._blocks, self._chains))
        first = next(iter(params.values()), torch.empty(0))
        self.device = first.device
        self.dtype = torch.float32 if first.device.type == "mps" else torch.float64
        self._elements = Elements(
            self.groups, self.sizes, self.copies, self.coordinates, self.dtype, self.device
        )

    def blocks(self, name: str) -> list[Block]:
        """The blocks that carry a group, in the order of the parameters; one entry for each factor."""
        if name not in self._blocks:
            known = ", ".join(self.groups) or "none"
            raise SymmetryError(f"no group {name!r} acts here; the groups are {known}")
        return list(self._blocks[name])

    def split(self, params: Params) -> dict[str, list[Tensor]]:
        """The blocks (views) of every declared parameter."""
        self._check_shapes(params)
        return {name: split(layout, params[name]) for name, layout in self.layouts.items()}

    def assemble(self, blocks: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """The inverse of `split`."""
        return {name: assemble(self.layouts[name], parts) for name, parts in blocks.items()}

    def stack(self, name: str, params: Params) -> tuple[Tensor, Tensor]:
        """All blocks that carry a group as rows: plain (*copies, m, n) and dual (*copies, k, n).

        The group maps the plain rows y to A y and the dual rows to A^-T y.
        """
        self._check_shapes(params)
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for block in self.blocks(name):
            view = split(self.layouts[block.parameter], params[block.parameter])[block.index]
            sides[block.dual].append(block.rows(view))
        n = self.sizes[name]
        empty = torch.empty(*self.copies[name], 0, n, dtype=self.dtype, device=self.device)
        plain, dual = (torch.cat(rows, dim=-2) if rows else empty for rows in sides)
        return plain, dual

    def identity(self) -> Element:
        """The identity."""
        return self._elements.identity()

    def random(
        self, generator: torch.Generator | None = None, only: Collection[str] | None = None
    ) -> Element:
        """A random element, far from the identity, drawn in float64 whatever the dtype of the parameters.

        With `only`, the parts of these names; the others are left out and stand for the identity.
        """
        return self._elements.random(generator, only)

    def random_algebra(self, generator: torch.Generator | None = None) -> Element:
        """A random algebra element with standard normal coordinates; discrete groups have none."""
        return self._elements.random_algebra(generator)

    def element(self, tensors: Mapping[str, Tensor]) -> Element:
        """An element from its tensors; names that are left out stand for the identity.

        Raises SymmetryError for an unknown name, a wrong shape (copies first), or an index tensor that is no
        permutation.
        """
        self._check_names(tensors)
        return Element({name: self._elements.part(name, x) for name, x in tensors.items()})

    def compose(self, g: Element, h: Element) -> Element:
        """The element g h, which acts by h first: act(compose(g, h), p) == act(g, act(h, p)).

        One stage if neither has flows, and a chain otherwise.
        """
        if self._flowing(g) or self._flowing(h):
            return Element(g.tensors, (*h.stages, *g.first))
        g, h = self._full(g), self._full(h)
        back = self.inverse(h)
        tensors = {
            name: group.compose(relabel(g[name], back, self._chains[name], self.groups), h[name])
            for name, group in self.groups.items()
        }
        return Element(tensors | {name: g[name] + self._carry(g, name, h[name]) for name in self.shifts})

    def inverse(self, g: Element) -> Element:
        """The inverse element; of an element with flows, a chain."""
        if self._flowing(g):
            stages = [back for stage in reversed(g.stages) for back in self._inverse_stages(stage)]
            return Element(stages[-1].tensors, tuple(stages[:-1]))
        g = self._full(g)
        linear = Element(
            {
                name: relabel(group.inverse(g[name]), g, self._chains[name], self.groups)
                for name, group in self.groups.items()
            }
        )
        return Element(linear.tensors | {name: -self._carry(linear, name, g[name]) for name in self.shifts})

    def act(self, g: Element, params: Params) -> dict[str, Tensor]:
        """The parameters moved by g: new tensors, same dtype and device; what g leaves alone is passed on.

        Differentiable, and usable inside torch.func transforms.
        """
        self._check_shapes(params)
        out = dict(params)
        for stage in g.stages:
            self._check_names(stage)
            out = self._translate(stage, {name: self._linear.act(stage, name, x) for name, x in out.items()})
            for name in self._flows_of(stage):
                moved = self.flows[name].act(stage[name], out)
                out |= {key: x.to(out[key].dtype) for key, x in moved.items()}
        return out

    def vertical(self, xi: Element, params: Params) -> dict[str, Tensor]:
        """The velocity d/dt act(exp(t xi), params) at t = 0; zero where nothing moves."""
        self._check_names(xi)
        self._check_shapes(params)
        out = {name: self._linear.vertical(xi, name, x) for name, x in params.items()}
        out = self._translate(xi, out)
        for name in self._flows_of(xi):
            steps = self.flows[name].vertical(xi[name], params)
            out |= {key: out[key] + step.to(out[key].dtype) for key, step in steps.items()}
        return out

    def _flows_of(self, g: Element) -> list[str]:
        """The flows that an element has, in the order in which they act."""
        return [name for name in self.flows if name in g]

    def _flowing(self, g: Element) -> bool:
        """Whether an element has parts that do not merge with others."""
        return bool(g.first or self._flows_of(g))

    def _inverse_stages(self, stage: Element) -> list[Element]:
        """The inverse of one stage: its flows backwards one by one, then the inverse of the rest."""
        back = [Element({name: -stage[name]}) for name in reversed(self._flows_of(stage))]
        rest = Element({name: x for name, x in stage.items() if name not in self.flows})
        return [*back, self.inverse(rest)] if len(rest) or not back else back

    def _translate(self, g: Element, params: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, shift in self.shifts.items():
            if name in g:
                for parameter, t in shift.expand(g[name]).items():
                    params[parameter] = params[parameter] + t.to(params[parameter])
        return params

    def _carry(self, g: Element, shift: str, coordinates: Tensor) -> Tensor:
        """The coordinates of a translation after the linear part of g."""
        translation = self.shifts[shift]
        moved = {name: self._linear.act(g, name, t) for name, t in translation.expand(coordinates).items()}
        return translation.extract(moved)

    def _full(self, g: Element) -> Element:
        """With all groups and shifts."""
        self._check_names(g)
        if len(g) == len(self.groups) + len(self.shifts):
            return g
        identity = self.identity()
        return Element({name: identity[name] for name in (*self.groups, *self.shifts)} | g.tensors)

    def _check_names(self, g: Mapping[str, Tensor]) -> None:
        self._elements.check_names(g)

    def _check_shapes(self, params: Params) -> None:
        refuse_sharded(params, "gather them with full_tensor(), or act before fully_shard")
        translated = [name for shift in self.shifts.values() for name in shift.layouts]
        flowing = [name for flow in self.flows.values() for name in (*flow.moves, *flow.reads)]
        for name in dict.fromkeys([*self.layouts, *translated, *flowing]):
            found = tuple(params[name].shape) if name in params else None
            if found != self.shapes[name]:
                raise SymmetryError(
                    f"parameter {name!r}: bound with shape {self.shapes[name]},"
                    f" found {'no such parameter' if found is None else found}; bind the symmetry again"
                )
