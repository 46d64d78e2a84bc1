"""Sizes: every axis is an equation between the sizes of its factors and its length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

from symgeo.errors import SymmetryError
from symgeo.groups import Group
from symgeo.symmetry.layout import Dim, Layout, size
from symgeo.symmetry.pattern import Factor, Leaf, Pattern, Tree, leaves, map_leaves


@dataclass(frozen=True)
class Variable:
    """A leaf whose size is to be found; `key` is its name, or unique for `_`."""

    key: str
    name: str | None
    dual: bool
    axis: int


@dataclass(frozen=True)
class Equation:
    """size(node) = length, for one axis of one parameter."""

    parameter: str
    pattern: Pattern
    axis: int
    node: Tree[Variable]
    length: int

    def unknowns(self, sizes: Mapping[str, int]) -> set[str]:
        """The variables without a size."""
        return {leaf.key for leaf in leaves(self.node)} - sizes.keys()

    def value(self, sizes: Mapping[str, int]) -> int:
        """The length of the axis at the given sizes."""
        return size(map_leaves(self.node, lambda leaf: _dim(leaf, sizes)))

    def __str__(self) -> str:
        return f"parameter {self.parameter!r} with pattern {str(self.pattern)!r}, axis {self.axis}"


def bind_layouts(
    patterns: Mapping[str, Pattern],
    shapes: Mapping[str, tuple[int, ...]],
    groups: Mapping[str, Group],
    sizes: Mapping[str, int],
) -> tuple[dict[str, int], dict[str, Layout]]:
    """Solve all sizes and give every parameter its layout.

    Known sizes are substituted; an equation with one unknown size gives it; repeated until nothing changes.
    Raises SymmetryError if lengths contradict each other or a size stays undetermined.

    >>> from symgeo.symmetry.pattern import parse
    >>> bind_layouts({"w": parse("(H e) _")}, {"w": (6, 5)}, {}, {"H": 2})[0]
    {'H': 2, 'e': 3}
    """
    equations = [
        Equation(parameter, pattern, axis, node, shapes[parameter][axis])
        for parameter, pattern in patterns.items()
        for axis, node in enumerate(_variables(parameter, pattern, shapes[parameter]))
    ]
    known = _solve(equations, _given(groups, sizes))
    _check_multiples(equations, groups, known)
    layouts: dict[str, Layout] = {parameter: () for parameter in patterns}
    for equation in equations:
        node = map_leaves(equation.node, lambda leaf: _dim(leaf, known))
        layouts[equation.parameter] += (node,)
    named = {leaf.key for equation in equations for leaf in leaves(equation.node) if leaf.name is not None}
    return {name: known[name] for name in known if name in named}, layouts


def _dim(leaf: Variable, sizes: Mapping[str, int]) -> Dim:
    return Dim(leaf.name, leaf.dual, sizes[leaf.key], leaf.axis)


def _variables(parameter: str, pattern: Pattern, shape: tuple[int, ...]) -> list[Tree[Variable]]:
    """The axes of a pattern with a variable at every leaf."""
    if len(pattern.axes) != len(shape):
        raise SymmetryError(
            f"parameter {parameter!r}: pattern {str(pattern)!r} has {len(pattern.axes)} axes, but the tensor"
            f" has {len(shape)} (shape {tuple(shape)}); write one entry for each axis, `_` where nothing acts"
        )
    numbers = count()

    def labelled(node: Tree[Leaf], axis: int) -> Tree[Variable]:
        return map_leaves(node, lambda leaf: _variable(leaf, f"_ #{next(numbers)} of {parameter}", axis))

    return [labelled(node, axis) for axis, node in enumerate(pattern.axes)]


def _variable(leaf: Leaf, anonymous: str, axis: int) -> Variable:
    if isinstance(leaf, Factor):
        return Variable(leaf.name, leaf.name, leaf.dual, axis)
    return Variable(anonymous, None, False, axis)


def _given(groups: Mapping[str, Group], sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes known before any equation."""
    known = {name: 1 for name, group in groups.items() if group.per is not None and group.scalar_per}
    known.update(sizes)
    return known


def _solve(equations: list[Equation], known: dict[str, int]) -> dict[str, int]:
    waiting = equations
    while waiting:
        later = []
        for equation in waiting:
            unknowns = equation.unknowns(known)
            if not unknowns:
                _check(equation, known)
            elif len(unknowns) > 1 or not _solve_one(equation, unknowns.pop(), known):
                later.append(equation)
        if len(later) == len(waiting):
            _fail_ambiguous(later[0], known)
        waiting = later
    return known


def _solve_one(equation: Equation, unknown: str, known: dict[str, int]) -> bool:
    """Find one size by bisection: the length grows with it. False if the length does not depend on it."""
    low, high = 0, equation.length
    if equation.value({**known, unknown: 0}) == equation.value({**known, unknown: 1}):
        return False
    while low < high:
        middle = (low + high) // 2
        if equation.value({**known, unknown: middle}) < equation.length:
            low = middle + 1
        else:
            high = middle
    if equation.value({**known, unknown: low}) != equation.length:
        raise SymmetryError(
            f"{equation}: the axis has length {equation.length}, and no whole number"
            f" {_label(unknown)} fits{_sizes_text(equation, known)}; correct the pattern or sizes={{...}}"
        )
    known[unknown] = low
    return True


def _check(equation: Equation, known: Mapping[str, int]) -> None:
    value = equation.value(known)
    if value != equation.length:
        raise SymmetryError(
            f"{equation}: the axis has length {equation.length}, but the pattern gives {value}"
            f"{_sizes_text(equation, known)}; correct the pattern or sizes={{...}}"
        )


def _sizes_text(equation: Equation, known: Mapping[str, int]) -> str:
    names = dict.fromkeys(leaf.key for leaf in leaves(equation.node) if leaf.key in known)
    return f" with {', '.join(f'{_label(name)} = {known[name]}' for name in names)}" if names else ""


def _label(key: str) -> str:
    return "`_`" if key.startswith("_ #") else key


def _fail_ambiguous(equation: Equation, known: Mapping[str, int]) -> None:
    unknowns = sorted(equation.unknowns(known))
    names = [name for name in unknowns if not name.startswith("_ #")]
    example = ", ".join(f'"{name}": ...' for name in names[: max(1, len(unknowns) - 1)])
    advice = f"give sizes={{{example}}}" if names else "name the slices and give their sizes={...}"
    raise SymmetryError(
        f"{equation}: the size{'s' * (len(unknowns) > 1)} of {', '.join(map(_label, unknowns))}"
        f" {'are' if len(unknowns) > 1 else 'is'} ambiguous: the axis has length {equation.length}"
        f"{_sizes_text(equation, known)}; {advice}"
    )


def _check_multiples(
    equations: list[Equation], groups: Mapping[str, Group], known: Mapping[str, int]
) -> None:
    for equation in equations:
        for leaf in leaves(equation.node):
            group = groups.get(leaf.key)
            if group is not None and known[leaf.key] % group.multiple:
                raise SymmetryError(
                    f"{equation}: {type(group).__name__} on {leaf.key} needs a size that is a multiple of"
                    f" {group.multiple}; found {known[leaf.key]}"
                )
