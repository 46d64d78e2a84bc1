"""From a symmetry and the shapes of a model's parameters to what its preconditioner is made of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from symgeo.curvature import Bucket, Decomposition
from symgeo.errors import SymmetryError
from symgeo.preconditioner.kinds import Cost, Kind
from symgeo.preconditioner.report import Layer, Parameter, PreconditionerReport
from symgeo.symmetry import Action, Symmetry

SHAMPOO = "Shampoo: the geometric mean of both sides, (m n)^(1/4) L^(-1/4) G R^(-1/4)"

#: the number of a layer in a name
_NUMBER = re.compile(r"(?<=[.\[])\d+(?=[.\]])")


@dataclass
class _Set:
    """Parameters that share statistics: their names in order, and the kinds of each symmetry."""

    names: list[str]
    kinds: list[Counter[Kind]] = field(default_factory=list)


def describe(
    symmetry: Symmetry | tuple[Symmetry, Symmetry], params: Mapping[str, Tensor], update_every: int = 1
) -> PreconditionerReport:
    """The preconditioner that `symgeo.optim.SymO` would use, without running it.

    params give names and shapes; those that the symmetry does not name, or freezes, are left to AdamW or to nobody.
    Numbered layers of one structure share a row.  The trivial kind has one second moment for each copy (SymO's
    default), powers are 1/2, and non-compact groups are averaged over their maximal compact subgroups.
    With update_every > 1 SymO keeps the roots too, which doubles the state.

    Raises SymmetryError for a symmetry that does not fit or has no average, ValueError for update_every < 1.

    >>> import torch
    >>> from symgeo.groups import Orthogonal
    >>> symmetry = Symmetry({"w": "_ n"}, {"n": Orthogonal()})
    >>> report = describe(symmetry, {"w": torch.empty(3, 5), "b": torch.empty(3)})
    >>> report.state, report.layers[0].method, [p.name for p in report.rest]
    (6, 'one-sided Shampoo (Muon at betas[1] = 0)', ['b'])
    """
    if update_every < 1:
        raise ValueError(f"update_every must be a whole number >= 1; got {update_every}")
    given = (symmetry,) if isinstance(symmetry, Symmetry) else symmetry
    linear = [replace(s, shifts={}, flows={}) for s in given]  # translations and shears leave no average
    compact = not all(s.orthogonal for s in linear)
    actions = [s.bind(params) for s in linear]
    moved = {name for a in actions for name in a.layouts if name not in a.frozen}
    members = {name: x for name, x in params.items() if name in moved}
    if not members:
        raise SymmetryError("the symmetry names no parameter of this model that is not frozen; choose other groups")
    splits = [Decomposition(s, members, compact) for s in linear]
    layers = [_layer(found, actions, update_every) for found in _sets(splits, list(members)) if any(found.kinds)]
    named = {name for a in actions for name in (*a.layouts, *a.frozen)}
    rest = [Parameter(name, tuple(x.shape)) for name, x in params.items() if name not in named]
    return PreconditionerReport(_folded(layers), _folded_rest(rest), update_every, compact)


def _sets(splits: Sequence[Decomposition], names: list[str]) -> list[_Set]:
    """The parameters, joined where some kind that a group moves has copies from several of them."""
    root = {name: name for name in names}

    def find(name: str) -> str:
        return name if root[name] == name else find(root[name])

    for bucket in (bucket for split in splits for bucket in split.buckets if not bucket.trivial):
        for rows in bucket.rows:
            for name, *_ in rows[1:]:
                root[find(name)] = find(rows[0][0])
    sets: dict[str, _Set] = {}
    for name in names:
        sets.setdefault(find(name), _Set([], [Counter() for _ in splits])).names.append(name)
    for side, split in enumerate(splits):
        for bucket in split.buckets:
            _collect(bucket, side, {name: sets[find(name)] for name in names})
    return list(sets.values())


def _collect(bucket: Bucket, side: int, places: Mapping[str, _Set]) -> None:
    """Adds the kinds of a bucket to the sets that carry them; the copies of the trivial kind to the set of each."""
    if bucket.trivial:
        copies: Counter[int] = Counter()
        for name, _, count in bucket.rows[0]:
            copies[id(places[name])] += count
        for found in {id(s): s for s in places.values()}.values():
            if copies[id(found)]:
                found.kinds[side][Kind("1", 1, copies[id(found)], 1, 1, False, True, len(found.names))] += 1
        return
    for key, rows in zip(bucket.kinds, bucket.rows):
        label = " ".join(f"{_short(group)}:{kind}" for group, kind in key)
        sources = len({name for name, *_ in rows})
        kind = Kind(label, bucket.batch, bucket.copies, bucket.dimension, bucket.coordinates, bucket.complex, False,
                    sources)
        places[rows[0][0]].kinds[side][kind] += 1


def _layer(found: _Set, actions: Sequence[Action], update_every: int) -> Layer:
    kinds = [replace(kind, blocks=kind.blocks * count) for counts in found.kinds for kind, count in counts.items()]
    cost = sum((kind.cost(update_every) for kind in kinds), Cost())
    state = sum(kind.numbers for kind in kinds) * (2 if update_every > 1 else 1)
    parameters = tuple(Parameter(name, actions[0].shapes[name], _axes(actions, name)) for name in found.names)
    groups = tuple(dict.fromkeys(text for action in actions for text in _groups(action, found.names)))
    return Layer(parameters, groups, tuple(kinds), _method(found, kinds), 1, state, cost)


def _method(found: _Set, kinds: Sequence[Kind]) -> str:
    """What the whole is known as: Shampoo where both of a pair whiten a matrix, else what its kinds are."""
    sides = [list(counts.elements()) for counts in found.kinds]
    if len(sides) == 2 and len(found.names) == 1 and all(len(side) == 1 and _irreducible(side[0]) for side in sides):
        return SHAMPOO
    return "; and ".join(dict.fromkeys(kind.method for kind in kinds))


def _irreducible(kind: Kind) -> bool:
    return kind.blocks == 1 and kind.dimension == kind.coordinates and not (kind.trivial or kind.complex)


def _axes(actions: Sequence[Action], name: str) -> str:
    """The pattern of a parameter with short names; of a pair, both."""
    layouts = [action.layouts[name] for action in actions if name in action.layouts]
    return " | ".join(" ".join(_short(re.sub(r":\d+", "", str(node))) for node in layout) for layout in layouts)


def _short(text: str) -> str:
    """Names without their scopes: "(H[layers.0] e[layers.0]*)" -> "(H e*)"."""
    return re.sub(r"\[[^\]]*\]", "", text)


def _groups(action: Action, names: Sequence[str]) -> list[str]:
    """The groups that act on these parameters, as "e GeneralLinear(32) per H"."""
    found = []
    for name, group in action.groups.items():
        if any(block.parameter in names for block in action.blocks(name)):
            per = f" per {_short(group.per)}" if group.per else ""
            found.append(f"{_short(name)} {type(group).__name__}({action.sizes[name]}){per}")
    return found


def _folded(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Layers that differ in nothing but numbers in the names of their parameters, as one."""
    alike: dict[object, list[Layer]] = {}
    for layer in layers:
        described = tuple((_NUMBER.sub("*", p.name), p.shape, p.axes) for p in layer.parameters)
        alike.setdefault((described, layer.groups, layer.kinds, layer.method), []).append(layer)
    result = []
    for same in alike.values():
        rows = zip(*(layer.parameters for layer in same))
        parameters = tuple(replace(row[0], name=_starred([p.name for p in row])) for row in rows)
        result.append(replace(same[0], parameters=parameters, layers=len(same)))
    return tuple(result)


def _folded_rest(rest: Sequence[Parameter]) -> tuple[Parameter, ...]:
    alike: dict[object, list[Parameter]] = {}
    for p in rest:
        alike.setdefault((_NUMBER.sub("*", p.name), p.shape), []).append(p)
    return tuple(
        replace(same[0], name=_starred([p.name for p in same]), count=len(same)) for same in alike.values()
    )


def _starred(names: Sequence[str]) -> str:
    """One name for several: a star where they differ.

    >>> _starred(["blocks.0.attention.0.weight", "blocks.1.attention.0.weight"])
    'blocks.*.attention.0.weight'
    """
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*(name.split(".") for name in names)))
