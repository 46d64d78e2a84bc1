"""The notation: one string per tensor, one node per axis.

axis    :=  _  |  factor  |  ( product + product + ... )
product :=  factor factor ...
factor  :=  name | name* | _ | ( ... ) | 1 | 0
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, NoReturn, TypeAlias, TypeVar

from symgeo.errors import SymmetryError

L = TypeVar("L")
M = TypeVar("M")


@dataclass(frozen=True)
class Leaf:
    """What a pattern bottoms out in."""


@dataclass(frozen=True)
class Free(Leaf):
    """`_`: the group leaves the axis alone; in a shift, the translation is free along it."""

    def __str__(self) -> str:
        return "_"


@dataclass(frozen=True)
class Constant(Leaf):
    """`1`: the translation is constant along the axis (shifts only)."""

    def __str__(self) -> str:
        return "1"


@dataclass(frozen=True)
class Zero(Leaf):
    """`0`: the translation does not touch the slice (shifts only)."""

    def __str__(self) -> str:
        return "0"


@dataclass(frozen=True)
class Factor(Leaf):
    """A named factor; with `dual`, its group acts by the inverse transpose."""

    name: str
    dual: bool = False

    def __str__(self) -> str:
        return self.name + "*" * self.dual


@dataclass(frozen=True)
class Product(Generic[L]):
    """Tensor product: the axis unflattened, the first part slowest."""

    parts: tuple[L | Product[L] | Sum[L], ...]

    def __str__(self) -> str:
        return f"({' '.join(map(str, self.parts))})"


@dataclass(frozen=True)
class Sum(Generic[L]):
    """Consecutive slices of the axis."""

    parts: tuple[L | Product[L] | Sum[L], ...]

    def __str__(self) -> str:
        terms = (str(part)[1:-1] if isinstance(part, Product) else str(part) for part in self.parts)
        return f"({' + '.join(terms)})"


Tree: TypeAlias = L | Product[L] | Sum[L]


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: one node for each axis; `str` renders it back."""

    axes: tuple[Tree[Leaf], ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.axes))

    def names(self) -> list[str]:
        """The names of the factors, in order of appearance."""
        found = [leaf.name for axis in self.axes for leaf in leaves(axis) if isinstance(leaf, Factor)]
        return list(dict.fromkeys(found))

    def rename(self, rule: Callable[[str], str]) -> Pattern:
        """The same pattern with every name replaced."""
        return Pattern(tuple(map_leaves(axis, lambda leaf: _renamed(leaf, rule)) for axis in self.axes))


def _renamed(leaf: Leaf, rule: Callable[[str], str]) -> Leaf:
    return Factor(rule(leaf.name), leaf.dual) if isinstance(leaf, Factor) else leaf


def leaves(node: Tree[L]) -> Iterator[L]:
    """The leaves of a node from left to right."""
    if isinstance(node, Product | Sum):
        for part in node.parts:
            yield from leaves(part)
    else:
        yield node


def map_leaves(node: Tree[L], function: Callable[[L], M]) -> Tree[M]:
    """The same tree with every leaf replaced."""
    if isinstance(node, Product):
        return Product(tuple(map_leaves(part, function) for part in node.parts))
    if isinstance(node, Sum):
        return Sum(tuple(map_leaves(part, function) for part in node.parts))
    return function(node)


_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*(?:\[[^\[\]\s]*\])?)(?P<dual>\s*\*)?|(?P<mark>[()+10]))")


@lru_cache(maxsize=4096)
def parse(text: str, shift: bool = False) -> Pattern:
    """Parse a pattern; with `shift`, the leaves `1` and `0` are allowed too.

    Raises SymmetryError with the place of the first mistake.

    >>> str(parse("_ (H e* + H e + H f)"))
    '_ (H e* + H e + H f)'
    >>> parse("(h s) _").names()
    ['h', 's']
    """
    return _Parser(text, shift).pattern()


class _Parser:
    """Recursive descent over one string."""

    def __init__(self, text: str, shift: bool) -> None:
        self.text, self.shift, self.position = text, shift, 0

    def pattern(self) -> Pattern:
        axes: list[Tree[Leaf]] = []
        while self._peek():
            if self._peek() in (")", "+"):
                self._fail(f"unexpected {self._peek()!r}; a sum of slices is written in parentheses")
            axes.append(self._atom())
        return Pattern(tuple(axes))

    def _atom(self) -> Tree[Leaf]:
        if self._peek() == "(":
            return self._sum()
        return self._leaf()

    def _sum(self) -> Tree[Leaf]:
        self.position += 1
        terms = [self._product()]
        while self._peek() == "+":
            self.position += 1
            terms.append(self._product())
        if self._peek() != ")":
            self._fail("expected ')' here")
        self.position += 1
        return _flat(Sum, terms)

    def _product(self) -> Tree[Leaf]:
        parts: list[Tree[Leaf]] = []
        while self._peek() not in ("+", ")", ""):
            parts.append(self._atom())
        if not parts:
            self._fail("expected a name, `_` or '(' here")
        return _flat(Product, parts)

    def _leaf(self) -> Leaf:
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            self._fail(f"unexpected character {self._peek()!r}")
        name, mark = match["name"], match["mark"]
        if mark is not None and not self.shift:
            self._fail(f"`{mark}` belongs to shifts only")
        if name == "_" and match["dual"]:
            self._fail("`_` has no dual")
        self.position = match.end()
        if mark is not None:
            return Constant() if mark == "1" else Zero()
        return Free() if name == "_" else Factor(name, bool(match["dual"]))

    def _peek(self) -> str:
        """The next character that is not blank, with the position moved onto it; '' at the end."""
        while self.text[self.position : self.position + 1].isspace():
            self.position += 1
        return self.text[self.position : self.position + 1]

    def _fail(self, reason: str) -> NoReturn:
        raise SymmetryError(f"pattern {self.text!r}: {reason}\n  {self.text}\n  {' ' * self.position}^")


def _flat(kind: type[Product[Leaf]] | type[Sum[Leaf]], parts: list[Tree[Leaf]]) -> Tree[Leaf]:
    """One node for nested nodes of a kind, and none for a single part."""
    if len(parts) == 1:
        return parts[0]
    flat: list[Tree[Leaf]] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, kind) else (part,))
    return kind(tuple(flat))


def merge(a: Pattern, b: Pattern, parameter: str) -> Pattern:
    """One pattern from two for the same tensor: on each axis one of them is `_`, or both are equal."""
    pairs = list(zip(a.axes, b.axes))
    if len(a.axes) != len(b.axes) or any(x != y and Free() not in (x, y) for x, y in pairs):
        raise SymmetryError(
            f"parameter {parameter!r} is declared twice, as {str(a)!r} and as {str(b)!r}; two declarations"
            " can be joined only where one of them has `_`"
        )
    return Pattern(tuple(y if x == Free() else x for x, y in pairs))
