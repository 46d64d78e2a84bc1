"""From a declaration with globs to one that names every parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache

from symgeo.errors import SymmetryError
from symgeo.groups import Group
from symgeo.symmetry.flow import Flow
from symgeo.symmetry.pattern import Pattern, merge, parse

Capture = tuple[str, ...]


@dataclass
class Declaration:
    """A declaration without globs: every name is one element; `declared` has the name that was written."""

    tensors: dict[str, Pattern] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    shifts: dict[str, dict[str, Pattern]] = field(default_factory=dict)
    flows: dict[str, Flow] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    declared: dict[str, str] = field(default_factory=dict)


def scope_glob(name: str) -> str:
    """The glob in brackets: "e[layers.*]" -> "layers.*", "e" -> ""."""
    return name[name.index("[") + 1 : -1] if name.endswith("]") else ""


def with_scope(name: str, glob: str) -> str:
    """The name inside a glob, outermost first: ("e[attn]", "layers.*") -> "e[layers.*.attn]"."""
    inner = scope_glob(name)
    return f"{name.split('[')[0]}[{glob}.{inner}]" if inner else f"{name}[{glob}]"


def fill(text: str, capture: Capture) -> str:
    """Put a match's segments in place of the stars: ("layers.*", ("3",)) -> "layers.3"."""
    segments = iter(capture)
    return re.sub(r"\*", lambda _: next(segments, "*"), text)


def _filled(pattern: Pattern, capture: Capture) -> Pattern:
    return pattern.rename(lambda name: fill(name, capture))


def expand(
    tensors: Mapping[str, str],
    groups: Mapping[str, Group],
    sizes: Mapping[str, int],
    shifts: Mapping[str, Mapping[str, str]],
    frozen: Iterable[str],
    scopes: Mapping[str, tuple[str, ...]],
    parameters: Iterable[str],
    flows: Mapping[str, Flow] | None = None,
) -> Declaration:
    """Replace every glob by its matches; every match has its own elements.

    Raises SymmetryError if a glob has no match, or a match lacks one of the declared parameters.
    """
    available = tuple(parameters)
    result = Declaration()
    names: dict[str, Capture] = {}
    for key, text in tensors.items():
        for parameter, capture in _matches(key, scopes.get(key, ()), available, text):
            for name in parse(text).names():
                names[fill(name, capture)] = capture[: name.count("*")]
                result.declared[fill(name, capture)] = name
            pattern = _filled(parse(text), capture)
            known = result.tensors.get(parameter)
            result.tensors[parameter] = pattern if known is None else merge(known, pattern, parameter)
    for shift, targets in shifts.items():
        for key, text in targets.items():
            for parameter, capture in _matches(key, scopes.get(key, ()), available, text):
                name = fill(shift, capture)
                result.declared[name] = shift
                result.shifts.setdefault(name, {})[parameter] = _filled(parse(text, shift=True), capture)
    for name, flow in (flows or {}).items():
        for filled, found in _expand_flow(name, flow, scopes, available).items():
            result.declared[filled], result.flows[filled] = name, found
    for filled, capture in names.items():
        declared = result.declared[filled]
        if declared in groups:
            per = groups[declared].per
            result.groups[filled] = replace(groups[declared], per=None if per is None else fill(per, capture))
        if declared in sizes:
            result.sizes[filled] = sizes[declared]
    result.groups = {name: result.groups[name] for name in _in_order(groups, result.groups, result.declared)}
    result.frozen = set(_frozen(frozen, scopes, available))
    return result


def _expand_flow(
    name: str, flow: Flow, scopes: Mapping[str, tuple[str, ...]], available: tuple[str, ...]
) -> dict[str, Flow]:
    """One flow for every match of the globs in its name."""
    places: dict[Capture, dict[str, str]] = {}
    for key in (*flow.moves, *flow.reads):
        for parameter, capture in _matches(key, scopes.get(key, ()), available, type(flow).__name__):
            places.setdefault(capture[: name.count("*")], {})[key] = parameter
    return {fill(name, capture): flow.renamed(place.__getitem__) for capture, place in places.items()}


def _in_order(
    groups: Mapping[str, Group], found: Mapping[str, Group], declared: Mapping[str, str]
) -> list[str]:
    """Concrete names in the order in which the user declared the groups."""
    order = {name: i for i, name in enumerate(groups)}
    return sorted(found, key=lambda name: order[declared[name]])


def _frozen(
    frozen: Iterable[str], scopes: Mapping[str, tuple[str, ...]], available: tuple[str, ...]
) -> Iterable[str]:
    for key in frozen:
        if "*" in key:
            expression = re.compile(_expression(key))
            yield from (name for name in available if expression.fullmatch(name))
        else:
            yield key


def _matches(
    key: str, levels: tuple[str, ...], available: tuple[str, ...], pattern: str
) -> list[tuple[str, Capture]]:
    """Every parameter that a key stands for, with the segments that its stars matched."""
    captures: list[Capture] = [()]
    for level in levels:
        found = _instances(level, available)
        kept = [capture for capture in found if any(capture[: len(outer)] == outer for outer in captures)]
        for outer in captures:
            if not any(capture[: len(outer)] == outer for capture in kept):
                raise SymmetryError(
                    f".each({level!r}): no parameter begins with {fill(level, outer) + '.'!r}"
                )
        captures = kept
    result = [(fill(key, capture), capture) for capture in captures]
    for parameter, _ in result:
        if parameter not in available:
            _fail_missing(parameter, levels, available, pattern)
    return result


@lru_cache(maxsize=1024)
def _instances(glob: str, available: tuple[str, ...]) -> tuple[Capture, ...]:
    """What the stars of a glob match among the prefixes of the parameters, in their order."""
    expression = re.compile(_expression(glob) + r"\.")
    found = (expression.match(name) for name in available)
    return tuple(dict.fromkeys(match.groups() for match in found if match))


def _expression(glob: str) -> str:
    return r"([^.]+)".join(re.escape(piece) for piece in glob.split("*"))


def _fail_missing(parameter: str, levels: tuple[str, ...], available: tuple[str, ...], pattern: str) -> None:
    scope = f" (every match of {levels[-1]!r} needs it)" if levels else ""
    close = get_close_matches(parameter, available, n=3)
    hint = f"; close names: {', '.join(map(repr, close))}" if close else ""
    raise SymmetryError(
        f"parameter {parameter!r}, declared with pattern {pattern!r}, is not among the {len(available)} given"
        f" parameters{scope}{hint}"
    )
