"""Where each group acts: the blocks that carry it, with the copies it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from symgeo.errors import SymmetryError
from symgeo.groups import Group, Permutation
from symgeo.symmetry.layout import Dim, Layout, block_dims

Chains = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Block:
    """One dense block of a parameter that carries a group, seen from that group.

    Attributes
    ----------
    parameter, index: the block is `action.split(params)[parameter][index]`
    dims: the dimensions of the block
    position: the dimension on which the group acts
    copies: the dimensions that number its copies, outermost first
    """

    parameter: str
    index: int
    dims: tuple[Dim, ...]
    position: int
    copies: tuple[int, ...]

    @property
    def dual(self) -> bool:
        """Whether the group acts by the inverse transpose here."""
        return self.dims[self.position].dual

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the block."""
        return tuple(dim.size for dim in self.dims)

    def rows(self, x: Tensor) -> Tensor:
        """The block as (*copies, rows, n): row vectors on which the group acts from the right."""
        order = self._order()
        *lead, n = (self.shape[i] for i in order)
        copies = lead[: len(self.copies)]
        return x.permute(order).reshape(*copies, prod(lead[len(self.copies) :]), n)

    def restore(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        order = self._order()
        unflat = rows.reshape([self.shape[i] for i in order])
        return unflat.permute([order.index(i) for i in range(len(order))])

    def _order(self) -> list[int]:
        rest = [i for i in range(len(self.dims)) if i != self.position and i not in self.copies]
        return [*self.copies, *rest, self.position]


def chains(groups: Mapping[str, Group]) -> Chains:
    """For every group the factors that number its copies, outermost first: ..., the `per` of `per`, `per`.

    >>> from symgeo.groups import SignFlip, Permutation
    >>> chains({"s": SignFlip(per="h"), "h": Permutation(per="H"), "H": Permutation()})
    {'s': ('H', 'h'), 'h': ('H',), 'H': ()}
    """
    return {name: _chain(name, groups) for name in groups}


def _chain(name: str, groups: Mapping[str, Group]) -> tuple[str, ...]:
    chain: list[str] = []
    per = groups[name].per
    while per is not None:
        if per in chain or per == name:
            raise SymmetryError(
                f"group {name!r}: `per` leads back to {per!r}; copies cannot be numbered by themselves"
            )
        chain.insert(0, per)
        outer = groups.get(per)
        if outer is not None and not outer.monomial:
            raise SymmetryError(
                f"group {name!r} is per {per!r}, on which {type(outer).__name__} acts; copies can be numbered"
                " only by a factor without a group, or with Permutation, SignFlip or PositiveScaling"
            )
        per = None if outer is None else outer.per
    return tuple(chain)


def find_blocks(
    layouts: Mapping[str, Layout], groups: Mapping[str, Group], chain_of: Chains
) -> dict[str, list[Block]]:
    """For every group the blocks that carry it, in the order of the parameters."""
    found: dict[str, list[Block]] = {name: [] for name in groups}
    for parameter, layout in layouts.items():
        for index, dims in enumerate(block_dims(layout)):
            for position, dim in enumerate(dims):
                if dim.name in found:
                    copies = tuple(_locate(per, dim, dims, parameter) for per in chain_of[dim.name])
                    found[dim.name].append(Block(parameter, index, dims, position, copies))
    return found


def _locate(per: str, dim: Dim, dims: tuple[Dim, ...], parameter: str) -> int:
    """The dimension of a block that numbers the copies: on the same axis if there is one, or the only one."""
    places = [i for i, other in enumerate(dims) if other.name == per]
    near = [i for i in places if dims[i].axis == dim.axis]
    if len(near) == 1 or len(places) == 1:
        return (near or places)[0]
    block = f"({' '.join(map(str, dims))})"
    problem = "does not have" if not places else "has more than once, so that the copies are ambiguous"
    raise SymmetryError(
        f"parameter {parameter!r}: the block {block} carries {dim.name!r}, which is per {per!r}, a factor"
        f" that the block {problem}; put {per!r} beside {dim.name!r} in the pattern, or drop per={per!r}"
    )


def relabel(
    copies: Tensor, permutations: Mapping[str, Tensor], chain: tuple[str, ...], groups: Mapping[str, Group]
) -> Tensor:
    """Carry a family of elements (*chain, ...) along with the permutations of its copies, inner first."""
    for axis in reversed(range(len(chain))):
        group = groups.get(chain[axis])
        if isinstance(group, Permutation):
            copies = group.act(permutations[chain[axis]], copies, axis=axis)
    return copies


def inner_first(
    blocks: Mapping[str, Sequence[Block]], chain_of: Mapping[str, tuple[str, ...]]
) -> dict[str, list[tuple[str, Block]]]:
    """For every parameter the factors on which a group acts, those with more levels of copies first."""
    schedule: dict[str, list[tuple[str, Block]]] = {}
    for name in sorted(blocks, key=lambda name: -len(chain_of[name])):
        for block in blocks[name]:
            schedule.setdefault(block.parameter, []).append((name, block))
    return schedule
