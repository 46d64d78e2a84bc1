"""How many independent directions the vertical space has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manifolds.linalg import gram
from symgeo.symmetry.action import Action
from symgeo.symmetry.element import Element
from symgeo.symmetry.stream import StreamRotation

#: above these a component is counted generator by generator
_MAX_ALGEBRA = 3000
_MAX_NUMBERS = 5 * 10**7
_CHUNK = 64
#: eigenvalues of the normalised Gram matrix below this are zero (3e-6 in terms of singular values)
_TOLERANCE = 1e-11

Params = Mapping[str, Tensor]
Place = tuple[str, int]


def vertical_dimension(action: Action, params: Params) -> int:
    """The rank of the vertical space { action.vertical(xi, params) } at params; discrete groups count 0.

    Generators (groups, shifts and flows) that share no block are independent, so that each connected component is
    counted by itself: a single generator by a formula in the ranks of its blocks, and so is the rotation of a
    residual stream, which shares blocks with everything and no direction with anything; a component of moderate
    size (algebra dimension up to 3000) by the Gram matrix of all its vertical vectors; a larger one as the
    sum over its generators, which is exact when these are independent and an upper bound otherwise.  Parameters on
    the meta device count as generic.

    >>> from symgeo.symmetry import Symmetry
    >>> from symgeo.groups import GeneralLinear
    >>> pair = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()}).bind
    >>> params = {"B": torch.randn(7, 2), "A": torch.zeros(2, 5)}
    >>> vertical_dimension(pair(params), params)
    4
    """
    return sum(_rank(action, params, names) for names in components(action))


def components(action: Action) -> list[list[str]]:
    """The generators of continuous motion, joined where they move a common block."""
    places = _places(action)
    found: list[tuple[set[str], set[Place]]] = []
    for name, touched in places.items():
        near = [component for component in found if component[1] & touched]
        found = [component for component in found if not component[1] & touched]
        names = {name}.union(*(component[0] for component in near))
        found.append((names, touched.union(*(component[1] for component in near))))
    order = list(places)
    return [sorted(names, key=order.index) for names, _ in found]


def _places(action: Action) -> dict[str, set[Place]]:
    places = {
        name: {(block.parameter, block.index) for block in action.blocks(name)}
        for name, group in action.groups.items()
        if not group.discrete
    }
    every: dict[str, set[Place]] = {}
    for touched in places.values():
        for place in touched:
            every.setdefault(place[0], set()).add(place)
    for name, shift in action.shifts.items():
        places[name] = {place for key in shift.layouts for place in every.get(key, set()) | {(key, -1)}}
    for name, flow in action.flows.items():
        moved = (place for key in flow.moves for place in every.get(key, set()) | {(key, -1)})
        places[name] = {(name, 0)} if isinstance(flow, StreamRotation) else set(moved)
    return places


def _rank(action: Action, params: Params, names: list[str]) -> int:
    if len(names) == 1 and (count := _alone(action, params, names[0])) is not None:
        return count
    dimension = sum(_algebra_dimension(action, name) for name in names)
    everywhere, absent = _places(action), any(x.is_meta for x in params.values())
    parameters = sorted({place[0] for name in names for place in everywhere[name]})
    numbers = sum(params[parameter].numel() for parameter in parameters)
    if not absent and dimension <= _MAX_ALGEBRA and dimension * numbers <= _MAX_NUMBERS:
        return _gram_rank(action, params, names, parameters)
    alone = (_alone(action, params, name) for name in names)
    return sum(_algebra_dimension(action, name) if n is None else n for name, n in zip(names, alone))


def _algebra_dimension(action: Action, name: str) -> int:
    if name in action.coordinates:
        return action.coordinates[name]
    return action.groups[name].dimension(action.sizes[name]) * torch.Size(action.copies[name]).numel()


def _alone(action: Action, params: Params, name: str) -> int | None:
    """The rank of one generator by its formula; None if a block carries the group twice. Shifts have full rank."""
    if name in action.flows:
        return action.flows[name].rank(params)
    if name in action.coordinates:
        return action.coordinates[name]
    blocks = action.blocks(name)
    if any(params[block.parameter].is_meta for block in blocks):
        return _algebra_dimension(action, name)
    if len({(block.parameter, block.index) for block in blocks}) < len(blocks):
        return None
    plain, dual = action.stack(name, params)
    return action.groups[name].orbit_dimension(plain, dual)


def _gram_rank(action: Action, params: Params, names: list[str], parameters: list[str]) -> int:
    """The rank of all vertical vectors, normalised one by one so that scales do not matter."""
    exact = {name: x.detach().to(action.dtype) for name, x in params.items()}
    rows = torch.cat([_vertical_vectors(action, exact, name, parameters) for name in names])
    norms = rows.norm(dim=1, keepdim=True)
    rows = rows[norms[:, 0] > 0] / norms[norms > 0].unsqueeze(1)
    if not len(rows):
        return 0
    values = torch.linalg.eigvalsh(gram(rows.mT))
    return int((values > _TOLERANCE * values[-1]).sum())


def _vertical_vectors(action: Action, params: Params, name: str, parameters: list[str]) -> Tensor:
    """The vertical vectors of a basis of one generator, flattened: (algebra dimension, numbers)."""

    def flat(xi: Tensor) -> Tensor:
        moved = action.vertical(Element({name: xi}), params)
        return torch.cat([moved[parameter].reshape(-1) for parameter in parameters])

    vectors = []
    for start in range(0, _algebra_dimension(action, name), _CHUNK):
        vectors.append(torch.func.vmap(flat)(_basis_chunk(action, name, start)))
    return torch.cat(vectors)


def _basis_chunk(action: Action, name: str, start: int) -> Tensor:
    dimension = _algebra_dimension(action, name)
    stop = min(start + _CHUNK, dimension)
    unit = torch.zeros(stop - start, dimension, dtype=action.dtype, device=action.device)
    unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
    if name in action.coordinates:
        return unit
    group, n, copies = action.groups[name], action.sizes[name], action.copies[name]
    return group.algebra(unit.reshape(stop - start, *copies, group.dimension(n)), n)
