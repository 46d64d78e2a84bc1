"""`Symmetry`: which group acts on which axis of which parameter, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeVar

from torch import Tensor

from symgeo.errors import SymmetryError
from symgeo.groups import KNOWN, Group
from symgeo.symmetry.action import Action
from symgeo.symmetry.blocks import chains
from symgeo.symmetry.dimension import vertical_dimension
from symgeo.symmetry.expand import expand, with_scope
from symgeo.symmetry.flow import Flow
from symgeo.symmetry.pattern import merge, parse

V = TypeVar("V")


@dataclass(frozen=True, init=False)
class Symmetry:
    """A declaration of symmetries; it knows names and no shapes, so that it fits models of every size.

    Parameters
    ----------
    tensors: parameter name -> pattern, one entry for each axis. `h` is a factor on which group h acts, `h*`
        one on which it acts by the inverse transpose, `_` one that is left alone; `(H e)` is an axis
        unflattened, `(a + b)` an axis cut into slices.
    groups: factor name -> group. The same name is the same element in every tensor. A name without a group is
        a factor on which nothing acts.
    sizes: sizes of factors that the shapes leave open, such as the number of heads.
    shifts: shift name -> {parameter: pattern}: translations; `1` constant along an axis, `_` free, `0` zero.
    frozen: parameters that nothing may move; every group, shift or flow that would move one becomes the identity.
    scopes: set by `each`.
    flows: flow name -> `symgeo.symmetry.flow.Flow`: directions that depend on other parameters; they act after
        groups and shifts, in this order.

    Raises SymmetryError if a pattern does not parse, or a group, size or `per` names no factor.

    >>> import torch
    >>> from symgeo.groups import GeneralLinear
    >>> lora = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})
    >>> params = {"B": torch.randn(7, 2), "A": torch.randn(2, 5)}
    >>> action = lora.bind(params)
    >>> moved = action.act(action.random(), params)
    >>> torch.allclose(moved["B"] @ moved["A"], params["B"] @ params["A"], atol=1e-4)
    True
    >>> lora.dimension(params)
    4
    """

    tensors: dict[str, str]
    groups: dict[str, Group]
    sizes: dict[str, int]
    shifts: dict[str, dict[str, str]]
    frozen: frozenset[str]
    scopes: dict[str, tuple[str, ...]]
    flows: dict[str, Flow]

    def __init__(
        self,
        tensors: Mapping[str, str],
        groups: Mapping[str, Group],
        sizes: Mapping[str, int] | None = None,
        shifts: Mapping[str, Mapping[str, str]] | None = None,
        frozen: Iterable[str] = (),
        scopes: Mapping[str, tuple[str, ...]] | None = None,
        flows: Mapping[str, Flow] | None = None,
    ) -> None:
        facts = {
            "tensors": dict(tensors),
            "groups": dict(groups),
            "sizes": dict(sizes or {}),
            "shifts": {name: dict(targets) for name, targets in (shifts or {}).items()},
            "frozen": frozenset(frozen),
            "scopes": dict(scopes or {}),
            "flows": dict(flows or {}),
        }
        for name, value in facts.items():
            object.__setattr__(self, name, value)
        self._validate()

    @property
    def orthogonal(self) -> bool:
        """Whether every element is an orthogonal map: orthogonal groups, no shifts and no flows."""
        return not self.shifts and not self.flows and all(group.orthogonal for group in self.groups.values())

    def bind(self, params: Mapping[str, Tensor]) -> Action:
        """Fit the declaration to parameters: expand globs, solve sizes, find the blocks of every group.

        Frozen parameters may be absent (`params` of the trainable ones only): what acts on them is the identity
        anyway, and flows that would need their values are left out.
        Raises SymmetryError naming the parameter, its pattern and both lengths if something does not fit.
        """
        here = self.without(name for name in self.frozen if "*" not in name and name not in params)
        declaration = expand(
            here.tensors, here.groups, here.sizes, here.shifts, here.frozen, here.scopes, params.keys(), here.flows
        )
        return Action(declaration, params)

    def without(self, parameters: Iterable[str]) -> Symmetry:
        """What is left where these parameters are constants that are not among the params: nothing that acts on
        them, no shift of them, no flow that moves or reads them.

        >>> from symgeo.groups import GeneralLinear, Permutation
        >>> pair = Symmetry({"B": "h r", "A": "r* _"}, {"r": GeneralLinear(), "h": Permutation()})
        >>> pair.without(["A"]).groups
        {'h': Permutation(per=None)}
        """
        absent = set(parameters)
        if not absent & {*self.tensors, *(p for f in self.flows.values() for p in (*f.moves, *f.reads)),
                         *(p for targets in self.shifts.values() for p in targets)}:
            return self
        fixed = {name for key in absent & self.tensors.keys() for name in parse(self.tensors[key]).names()}
        tensors = {key: text for key, text in self.tensors.items() if key not in absent}
        names = {name for text in tensors.values() for name in parse(text).names()}
        return Symmetry(
            tensors,
            {name: group for name, group in self.groups.items() if name in names - fixed},
            {name: size for name, size in self.sizes.items() if name in names},
            {name: targets for name, targets in self.shifts.items() if not absent & targets.keys()},
            self.frozen - absent,
            {key: levels for key, levels in self.scopes.items() if key not in absent},
            {name: flow for name, flow in self.flows.items() if not absent & {*flow.moves, *flow.reads}},
        )

    def concrete(self, params: Mapping[str, Tensor]) -> Symmetry:
        """The declaration for these parameters, without globs and with all sizes.

        >>> import torch
        >>> from symgeo.groups import Permutation
        >>> wide = Symmetry({"up": "h _", "down": "_ h"}, {"h": Permutation()}).each("layers.*")
        >>> params = {f"layers.{i}.{name}": torch.zeros(2, 2) for i in range(2) for name in ("up", "down")}
        >>> wide.concrete(params).without(["layers.0.up", "layers.0.down"]).tensors
        {'layers.1.up': 'h[layers.1] _', 'layers.1.down': '_ h[layers.1]'}
        """
        declaration = expand(
            self.tensors, self.groups, self.sizes, self.shifts, self.frozen, self.scopes, params.keys(), self.flows
        )
        sizes = Action(declaration, params).sizes
        return Symmetry(
            {name: str(pattern) for name, pattern in declaration.tensors.items()}, declaration.groups, sizes,
            {name: {key: str(pattern) for key, pattern in targets.items()}
             for name, targets in declaration.shifts.items()},
            declaration.frozen, {}, declaration.flows,
        )

    def dimension(self, params: Mapping[str, Tensor]) -> int:
        """The number of independent flat directions at params: the rank of the vertical space.

        See `symgeo.symmetry.vertical_dimension` for what is exact and when.
        """
        return vertical_dimension(self.bind(params), params)

    def each(self, glob: str, shared: Iterable[str] = ()) -> Symmetry:
        """The same declaration under every prefix that the glob matches, each with its own elements.

        A `*` matches one dotted segment. Names in `shared` stay one element for all matches.

        >>> from symgeo.groups import Permutation
        >>> Symmetry({"up": "h _", "down": "_ h"}, {"h": Permutation()}).each("layers.*").tensors
        {'layers.*.up': 'h[layers.*] _', 'layers.*.down': '_ h[layers.*]'}
        """
        if not glob or any(not part for part in glob.split(".")):
            raise SymmetryError(
                f"each: {glob!r} is no prefix of parameter names; write for example 'layers.*'"
            )
        kept = set(shared)
        self._check_shared(kept)

        here = self.relabelled(lambda name: name if name in kept else with_scope(name, glob))
        keys = {*self.tensors, *(key for targets in self.shifts.values() for key in targets)}
        keys |= {key for flow in self.flows.values() for key in (*flow.moves, *flow.reads)}
        return Symmetry(
            {f"{glob}.{key}": text for key, text in here.tensors.items()},
            here.groups,
            here.sizes,
            {name: {f"{glob}.{key}": text for key, text in targets.items()} for name, targets in here.shifts.items()},
            {f"{glob}.{key}" for key in self.frozen},
            {f"{glob}.{key}": (glob, *(f"{glob}.{level}" for level in self.scopes.get(key, ()))) for key in keys},
            {name: flow.renamed(lambda key: f"{glob}.{key}") for name, flow in here.flows.items()},
        )

    def relabelled(self, rule: Callable[[str], str]) -> Symmetry:
        """The same declaration with every factor, group, shift and flow under another name.

        >>> from symgeo.groups import Permutation
        >>> Symmetry({"up": "h _", "down": "_ h"}, {"h": Permutation()}).relabelled(lambda name: f"{name}2").tensors
        {'up': 'h2 _', 'down': '_ h2'}
        """
        def relabel(targets: Mapping[str, str], shift: bool) -> dict[str, str]:
            return {key: str(parse(text, shift=shift).rename(rule)) for key, text in targets.items()}

        groups = {rule(name): replace(group, per=None if group.per is None else rule(group.per))
                  for name, group in self.groups.items()}
        return Symmetry(
            relabel(self.tensors, False), groups, {rule(name): size for name, size in self.sizes.items()},
            {rule(name): relabel(targets, True) for name, targets in self.shifts.items()}, self.frozen, self.scopes,
            {rule(name): flow for name, flow in self.flows.items()},
        )

    def __or__(self, other: Symmetry) -> Symmetry:
        """Both declarations together. The same name with an equal group is the same element.

        Raises SymmetryError if a name has two groups or sizes, or a parameter two patterns that do not join.
        """
        tensors = dict(self.tensors)
        for key, text in other.tensors.items():
            tensors[key] = str(merge(parse(tensors[key]), parse(text), key)) if key in tensors else text
        shifts = {name: dict(targets) for name, targets in self.shifts.items()}
        for name, targets in other.shifts.items():
            shifts[name] = _join(f"shift {name!r}: parameter", shifts.get(name, {}), targets)
        levels = {
            key: tuple(sorted({*self.scopes.get(key, ()), *other.scopes.get(key, ())}, key=len))
            for key in {**self.scopes, **other.scopes}
        }
        return Symmetry(
            tensors,
            _join("group", self.groups, other.groups),
            _join("size", self.sizes, other.sizes),
            shifts,
            self.frozen | other.frozen,
            levels,
            _join("flow", self.flows, other.flows),
        )

    def _validate(self) -> None:
        for name, group in self.groups.items():
            if not isinstance(group, Group):
                raise SymmetryError(f"group {name!r} must be a symgeo.groups.Group, found {group!r}")
            if isinstance(group, KNOWN) and type(group) not in KNOWN:
                parent = next(known for known in KNOWN if isinstance(group, known)).__name__
                raise SymmetryError(
                    f"group {name!r}: {type(group).__name__} is a subclass of {parent}, and would be taken for all of"
                    " it; derive it from symgeo.groups.Group"
                )
        names = {name for text in self.tensors.values() for name in parse(text).names()}
        for targets in self.shifts.values():
            for text in targets.values():
                parse(text, shift=True)
        for kind, given in (("group", self.groups), ("size", self.sizes)):
            for name in given:
                if name not in names:
                    raise SymmetryError(f"{kind} {name!r} is given, but no pattern has a factor of this name")
        for name, group in self.groups.items():
            if group.per is not None and group.per not in names:
                raise SymmetryError(
                    f"group {name!r} is per {group.per!r}, but no pattern has a factor of this name"
                )
        for name, flow in self.flows.items():
            if not isinstance(flow, Flow):
                raise SymmetryError(f"flow {name!r} must be a symgeo.symmetry.Flow, found {flow!r}")
        kinds = {"factor": names, "shift": self.shifts.keys(), "flow": self.flows.keys()}
        for one, other in combinations(kinds, 2):
            for name in kinds[one] & kinds[other]:
                raise SymmetryError(f"{name!r} is both a {one} and a {other}; give one of them another name")
        chains(self.groups)

    def _check_shared(self, shared: set[str]) -> None:
        for name in shared & self.flows.keys():
            raise SymmetryError(f"each: {name!r} is a flow, which is never shared by several matches")
        for name in shared & self.groups.keys():
            per = self.groups[name].per
            if per is not None and per not in shared:
                raise SymmetryError(
                    f"each: {name!r} is shared, so {per!r}, which numbers its copies, must be shared"
                )


def _join(kind: str, a: Mapping[str, V], b: Mapping[str, V]) -> dict[str, V]:
    """The union of two mappings that agree where both speak."""
    for name in a.keys() & b.keys():
        if a[name] != b[name]:
            raise SymmetryError(
                f"{kind} {name!r} is {a[name]!r} on one side of `|` and {b[name]!r} on the other"
            )
    return {**a, **b}
