"""The symmetries of a chain of affine maps, written on the channels between them.

Notation of a declaration, numbered by place: h the channels (G groups of h), u their scalings, s their signs, x the
scale that a norm removes; shift and scale, flows of channels; mean, rows, rotation, what norms leave; slack, of linear
chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from symgeo.groups import GeneralLinear, Group, Permutation, PositiveScaling, SignFlip
from symgeo.models.chain import Affine, Constant, Cut, Fixed, Item, Normaliser
from symgeo.models.wires import Wire, wire
from symgeo.symmetry import Flow, Symmetry
from symgeo.symmetry.channels import ChannelScale, Port


@dataclass(frozen=True)
class Chain:
    """The affine maps of a chain, and what stands before each of them and behind the last."""

    nodes: tuple[Affine, ...]
    edges: tuple[tuple[Item, ...], ...]

    @cached_property
    def wires(self) -> tuple[Wire, ...]:
        """What passes from every map to the next."""
        return tuple(map(wire, self.nodes, self.edges[1:], self.nodes[1:]))

    def cut(self, i: int) -> bool:
        """Whether something unknown stands before map i, or nothing that is known."""
        return i in (0, len(self.nodes)) or any(isinstance(item, Cut) for item in self.edges[i])

    def behind(self, i: int) -> tuple[Item, ...]:
        """What is known to stand behind map i."""
        edge = self.edges[i + 1]
        cuts = [k for k, item in enumerate(edge) if isinstance(item, Cut)]
        return edge[: cuts[0]] if cuts else edge


def split_chain(items: Sequence[Item]) -> Chain:
    """The maps of a list of items and what stands between."""
    edges: list[list[Item]] = [[]]
    for item in items:
        if isinstance(item, Affine):
            edges.append([])
        else:
            edges[-1].append(item)
    return Chain(tuple(item for item in items if isinstance(item, Affine)), tuple(map(tuple, edges)))


@dataclass
class Draft:
    """A declaration while it is written: the factors at the inputs and the outputs of every map."""

    chain: Chain
    scope: str
    inputs: dict[int, list[str]] = field(default_factory=dict)
    outputs: dict[int, list[str]] = field(default_factory=dict)
    bases: dict[int, list[str]] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    shifts: dict[str, dict[str, str]] = field(default_factory=dict)
    flows: dict[str, Flow] = field(default_factory=dict)

    def name(self, letter: str, number: int) -> str:
        """A name that no other place has."""
        return f"{letter}{number}[{self.scope}]" if self.scope else f"{letter}{number}"

    def axis(self, factors: Sequence[str], pixels: int = 1) -> str:
        """The pattern of an axis; `_` where nothing acts."""
        names = [factor.rstrip("*") for factor in factors]
        if not any(name in self.groups or name in self.sizes for name in names):
            return "_"
        parts = [*factors, *(["_"] if pixels > 1 else [])]
        return f"({' '.join(parts)})" if len(parts) > 1 else parts[0]

    def finish(self) -> Symmetry:
        """The declaration, with the patterns of all maps."""
        for i, node in enumerate(self.chain.nodes):
            written, read = self.outputs.get(i, []), self.inputs.get(i, [])
            if node.diagonal:
                base = self.bases.get(i, [])
                axes = [self.axis([*base, *read, *written])]
                bias = self.axis([*base, *written])
            else:
                axes = [self.axis(written), self.axis(read, node.pixels)]
                bias = axes[0]
                axes = axes[::-1] if node.transposed else axes
            found = {node.weight: " ".join([*axes, *["_"] * (node.axes - len(axes))])}
            found |= {node.bias: bias} if node.bias else {}
            self.tensors |= {key: text for key, text in found.items() if set(text) - set("_ ")}
        return Symmetry(self.tensors, self.groups, self.sizes, self.shifts, flows=self.flows)


@dataclass(frozen=True)
class Region:
    """The channels between two maps that mix them: maps ``first`` to ``last`` of a chain, the inner ones diagonal.

    closed : both ends are such maps, so that the channels are seen from nowhere else;  groups : into how many groups
    its norms divide the channels;  permuted : whether they may be permuted
    """

    chain: Chain
    first: int
    last: int

    @property
    def closed(self) -> bool:
        """Whether it ends with a map that mixes the channels, as it begins with one."""
        ends = (self.chain.nodes[self.first], self.chain.nodes[self.last])
        return self.first < self.last and not any(end.diagonal for end in ends)

    @property
    def written(self) -> range:
        """The maps that write the channels."""
        ends = self.first < self.last and not self.chain.nodes[self.last].diagonal
        return range(self.first, self.last if ends else self.last + 1)

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """All that stands behind its writers."""
        return tuple(item for i in self.written for item in self.chain.behind(i))

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """The numbers of groups of its norms, other than one group, or one for every channel."""
        trivial = (1, self.chain.nodes[self.first].channels[1])
        found = {item.groups for item in self.items if isinstance(item, Normaliser)}
        return tuple(sorted(found.difference(trivial)))

    @property
    def permuted(self) -> bool:
        """Whether channels may be permuted: they have no constants of their own, and groups of one kind."""
        same = all(item.uniform for item in self.items if isinstance(item, Constant))
        return self.closed and same and len(self.groups) < 2

    @property
    def linear(self) -> bool:
        """Whether all linear maps of channels pass."""
        return self.closed and self.last == self.first + 1 and self.chain.wires[self.first].mixes


def regions(chain: Chain) -> list[Region]:
    """All regions of a chain, in order."""
    starts = [i for i, node in enumerate(chain.nodes) if not node.diagonal or chain.cut(i)]
    found = []
    for start in starts:
        last = start
        while not chain.cut(last + 1):
            last += 1
            if not chain.nodes[last].diagonal:
                break
        found.append(Region(chain, start, last))
    return found


def write_region(draft: Draft, number: int, region: Region, approximate: bool) -> None:
    """The groups of a region, the flows that stand for scalings, and what its norms remove."""
    h, split = draft.name("h", number), draft.name("G", number)
    if region.linear:
        draft.groups[h] = GeneralLinear()
        draft.outputs[region.first], draft.inputs[region.last] = [h], [f"{h}*"]
        return
    _wires(draft, region, h)
    divided = bool(region.groups) and len(region.groups) == 1 and (region.permuted or not _acted(draft, region))
    base = [split, h] if divided else [h]
    if divided:
        draft.sizes[split] = region.groups[0]
    if region.permuted:
        draft.groups |= {h: Permutation(per=split if divided else None)} | ({split: Permutation()} if divided else {})
    for i in region.written:
        _remove(draft, i, base, approximate)
    for i in region.written:
        node = draft.chain.nodes[i]
        if node.diagonal:
            draft.bases[i] = base
        else:
            draft.outputs[i] = [*base, *draft.outputs.get(i, [])]
    if region.last not in region.written:
        draft.inputs[region.last] = [*base, *draft.inputs.get(region.last, [])]
    slopes = [item.slopes for item in region.items if isinstance(item, Fixed) and item.slopes]
    draft.tensors |= {name: draft.axis(base) for name in slopes if draft.axis(base) != "_"}


def _acted(draft: Draft, region: Region) -> bool:
    return any(draft.outputs.get(i) for i in region.written)


def _wires(draft: Draft, region: Region, h: str) -> None:
    """Scalings and signs that pass from one map of a region to the next."""
    for i in range(region.first, region.last):
        passing = draft.chain.wires[i]
        writer, reader = draft.chain.nodes[i], draft.chain.nodes[i + 1]
        if passing.degree and (passing.behind or passing.before):
            read = reading_port(reader if passing.before else replace(reader, bias=None))
            draft.flows[draft.name("scale", i)] = ChannelScale(
                writing_port(writer), read, passing.behind, passing.before, passing.degree)
        elif passing.degree:
            _trade(draft, i, draft.name("u", i), PositiveScaling(per=h), passing.degree)
        if passing.parity:
            _trade(draft, i, draft.name("s", i), SignFlip(per=h), max(passing.parity, 0))


def _trade(draft: Draft, i: int, name: str, group: Group, degree: int) -> None:
    draft.groups[name] = group
    draft.outputs.setdefault(i, []).append(name)
    draft.inputs.setdefault(i + 1, []).extend([f"{name}*"] * degree)


def _remove(draft: Draft, i: int, base: list[str], approximate: bool) -> None:
    """What the first norm behind map i removes of what it writes: means, and sizes where its eps is 0."""
    edge = draft.chain.behind(i)
    place = next((k for k, item in enumerate(edge) if isinstance(item, Normaliser)), None)
    norm = edge[place] if place is not None else None
    if not isinstance(norm, Normaliser):
        return
    node, before = draft.chain.nodes[i], edge[:place]
    apart, single = norm.groups == node.channels[1], norm.groups == 1
    if not (apart or single or len(base) > 1):
        return
    known = [item for item in before if isinstance(item, Fixed)]
    if len(known) < len(before):
        return
    if norm.divides and (norm.scale_free or approximate) and all(item.degree for item in known):
        name = draft.name("x", i)
        draft.groups[name] = PositiveScaling(per=None if single else base[-1] if apart else base[0])
        draft.sizes |= {name: 1} if single else {}
        draft.outputs.setdefault(i, []).append(name)
    if norm.centred and all(item.shifts for item in known):
        factors = [*base, *(draft.outputs.get(i, []))]
        axis = "1" if single else "_" if apart else f"({' '.join(['_', *['1'] * (len(factors) - 1)])})"
        shift = {node.bias: axis} if node.bias else {}
        if norm.rows and not node.diagonal and not apart:
            shift[node.weight] = f"{axis} _"
        draft.shifts |= {draft.name("mean", i): shift} if shift else {}


def reading_port(node: Affine, factor: tuple[float, ...] | None = None) -> Port:
    """A map as what reads channels, which have been multiplied by a factor."""
    return Port(node.weight, node.bias, 0 if node.diagonal or node.transposed else 1, node.diagonal, factor)


def writing_port(node: Affine) -> Port:
    """A map as what writes them."""
    return Port(node.weight, node.bias, 1 if node.transposed else 0, node.diagonal)
