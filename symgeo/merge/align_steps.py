"""The steps of an alignment: one permutation with all that moves with it, or one group alone, solved exactly.

Everything else fixed, the squared distance of two models is a constant minus twice an inner product that is linear
in the compact part of one group.  Below a permutation stand the groups with a copy for each of its indices: to match
index i with index j costs what is left after the best elements of their copies, so that

    scores[i, j] = <S_i, T_j> + sum over the groups below of the gain of their cross products C[i, j]

and the assignment is exact for the permutation and the copies together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from string import ascii_letters

import torch
from torch import Tensor

from symgeo.functional import Params
from symgeo.groups import Group, Permutation
from symgeo.merge.align_groups import Compact, compact_part, coordinates
from symgeo.symmetry import Action, Block, split

Products = dict[str, Tensor]  # the cross products of every group of a step


@dataclass(frozen=True)
class Part:
    """A block as the innermost group of a step sees it; ``others`` are the compact groups on its other axes."""

    name: str
    block: Block
    others: frozenset[str]

    def rows(self, action: Action, params: Params) -> Tensor:
        """The rows of the block, (*copies, m, n)."""
        name = self.block.parameter
        return self.block.rows(split(action.layouts[name], params[name])[self.block.index])


@dataclass(frozen=True)
class Step:
    """A tree of groups: ``below[name]`` are the groups whose copies the permutation ``name`` moves.

    Other factors that number copies are tied: source copy k belongs to target copy k.
    """

    root: str
    below: Mapping[str, tuple[str, ...]]
    parts: tuple[Part, ...]

    @property
    def members(self) -> tuple[str, ...]:
        """All groups of the step."""
        return tuple(self.below)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that the step moves."""
        return tuple(dict.fromkeys(part.block.parameter for part in self.parts))

    def solve(self, action: Action, source: Params, target: Params, parts: Iterable[Part]) -> dict[str, Tensor]:
        """The element that brings the source closest to the target on the given parts.

        Groups that carry none of the parts are left out.
        """
        products: Products = {}
        for part in parts:
            found = self._product(action, part, source, target)
            products[part.name] = products[part.name] + found if part.name in products else found
        return self._best(action.groups, self.root, products)

    def _product(self, action: Action, part: Part, source: Params, target: Params) -> Tensor:
        """``(..., i, j, ..., a, b)``: a pair of axes for every permutation of the step, one for every tied factor."""
        group = action.groups[part.name]
        letters = (ascii_letters[i] for i in count())
        chain = [part.block.dims[place].name for place in part.block.copies]
        levels = [(next(letters), next(letters)) if name in self.below else (next(letters),) * 2 for name in chain]
        row, first, second = (next(letters) for _ in range(3))
        compact = _compact(part.name, group)
        second = second if compact.square else first
        left = "".join(level[0] for level in levels) + row + first
        right = "".join(level[1] for level in levels) + row + second
        out = "".join(dict.fromkeys("".join(a + b for a, b in [*levels, (first, second)])))
        s, t = (coordinates(group, part.rows(action, params)) for params in (source, target))
        return torch.einsum(f"{left},{right}->{out}", s, t.conj())

    def _scores(self, groups: Mapping[str, Group], name: str, products: Products) -> Tensor | None:
        """``scores[..., i, j]`` of a permutation, None if it carries nothing."""
        total = products.get(name)
        for child in self.below[name]:
            gain = self._gain(groups, child, products)
            if gain is not None:
                gain = gain.flatten(-self._tied(groups, child)).sum(-1) if self._tied(groups, child) else gain
                total = gain if total is None else total + gain
        return total

    def _tied(self, groups: Mapping[str, Group], name: str) -> int:
        """The number of tied factors between a group and the permutation above it."""
        found, per = 0, groups[name].per
        while per is not None and per not in self.below:
            found, per = found + 1, groups[per].per if per in groups else None
        return found

    def _gain(self, groups: Mapping[str, Group], name: str, products: Products) -> Tensor | None:
        table = self._table(groups, name, products)
        return None if table is None else _compact(name, groups[name]).gain(table)

    def _table(self, groups: Mapping[str, Group], name: str, products: Products) -> Tensor | None:
        return self._scores(groups, name, products) if self.below[name] else products.get(name)

    def _best(self, groups: Mapping[str, Group], name: str, products: Products) -> dict[str, Tensor]:
        """The best elements of a group and of all below it, copies in the order of the source."""
        table = self._table(groups, name, products)
        if table is None:
            return {}
        best = _compact(name, groups[name]).best(table)
        result = {name: best}
        if self.below[name]:
            inside = {key for child in self.below[name] for key in self._subtree(child)}
            matched = {key: _matched(x, best) for key, x in products.items() if key in inside}
            for child in self.below[name]:
                found = self._best(groups, child, matched)
                result |= {key: _picked(x, best.argsort(-1)) for key, x in found.items()}
        return result

    def _subtree(self, name: str) -> list[str]:
        return [name, *(key for child in self.below[name] for key in self._subtree(child))]


def _matched(pairs: Tensor, p: Tensor) -> Tensor:
    """The entries of matched pairs: (*b, n, n, ...) and (*b, n) -> x[*b, j] = pairs[*b, p[j], j]."""
    n = p.shape[-1]
    flat, index = pairs.reshape(-1, n, n, *pairs.shape[p.ndim + 1 :]), p.reshape(-1, n)
    batch = torch.arange(len(index), device=p.device).unsqueeze(-1)
    return flat[batch, index, torch.arange(n, device=p.device)].reshape(*p.shape, *pairs.shape[p.ndim + 1 :])


def _picked(x: Tensor, p: Tensor) -> Tensor:
    """(*b, n, ...) and (*b, n) -> x[*b, p[i]]."""
    n = p.shape[-1]
    flat, index = x.reshape(-1, n, *x.shape[p.ndim :]), p.reshape(-1, n)
    return flat[torch.arange(len(index), device=p.device).unsqueeze(-1), index].reshape(x.shape)


def _compact(name: str, group: Group) -> Compact:
    found = compact_part(name, group)
    assert found is not None
    return found


def compact_names(action: Action) -> list[str]:
    """The groups with a compact part that is not trivial, in the order of the declaration."""
    return [name for name, group in action.groups.items() if compact_part(name, group) is not None]


def clusters(action: Action) -> list[Step]:
    """One step for every group that no permutation moves, and one for every group that its cluster cannot solve.

    The latter are groups that share a block with another group of their cluster; they get a step of their own.
    """
    compact = compact_names(action)
    above = {name: _above(action.groups, name) for name in compact}
    steps, alone = [], []
    for root in compact:
        if above[root]:
            continue
        members = [name for name in compact if name == root or root in above[name]]
        parts, shared = _parts(action, members, above, compact)
        below = {name: tuple(key for key in members if above[key][:1] == [name]) for name in members}
        steps.append(Step(root, below, tuple(parts)))
        alone += shared
    return steps + [single(action, name) for name in dict.fromkeys(alone)]


def single(action: Action, name: str) -> Step:
    """The step of one group alone, all permutations as they are."""
    compact = compact_names(action)
    parts = [Part(name, block, _others(block, compact)) for block in action.blocks(name)]
    return Step(name, {name: ()}, tuple(parts))


def _above(groups: Mapping[str, Group], name: str) -> list[str]:
    """The permutations that move the copies of a group, the nearest first."""
    found, per = [], groups[name].per
    while per is not None and per in groups:
        if isinstance(groups[per], Permutation):
            found.append(per)
        per = groups[per].per
    return found


def _parts(
    action: Action, members: list[str], above: Mapping[str, list[str]], compact: Collection[str]
) -> tuple[list[Part], list[str]]:
    """Every block of a cluster with its innermost group, and the groups that share a block with that one."""
    carried: dict[tuple[str, int], list[str]] = {}
    for name in members:
        for block in action.blocks(name):
            carried.setdefault((block.parameter, block.index), []).append(name)
    innermost: dict[tuple[str, int], str] = {}
    shared = []
    for place, names in carried.items():
        leaves = [name for name in dict.fromkeys(names) if not any(name in above[other] for other in names)]
        innermost[place] = leaves[0]
        shared += leaves[1:]
    parts = [
        Part(name, block, _others(block, compact))
        for name in members
        for block in action.blocks(name)
        if innermost[block.parameter, block.index] == name
    ]
    return parts, shared


def _others(block: Block, compact: Collection[str]) -> frozenset[str]:
    own = {block.position, *block.copies}
    names = (dim.name for i, dim in enumerate(block.dims) if i not in own)
    return frozenset(name for name in names if name is not None and name in compact)
