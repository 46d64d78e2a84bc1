"""The measured error of a declaration: does the function really not change, while the parameters do?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, nan

import torch
from torch import Tensor

from symgeo.distributed import refuse_sharded
from symgeo.symmetry.action import Action
from symgeo.symmetry.spec import Symmetry

Params = Mapping[str, Tensor]
Function = Callable[[dict[str, Tensor]], Tensor | tuple[Tensor, ...]]

#: the number of a layer in the scope of a name, as in "e[layers.3]"
_NUMBER = re.compile(r"(?<=[.\[])\d+(?=[.\]])")
#: an element that moves the parameters less than this shows nothing
_LEAST_MOTION = 1e-3
#: small discrete groups draw the identity now and then; such draws are repeated
_DRAWS = 16


@dataclass(frozen=True)
class GroupReport:
    """What the elements of one declared group (shift, flow) alone do.

    Attributes
    ----------
    name, kind: as declared
    copies: how many independent elements it has, over all matches of a glob
    dimension: the dimension of its algebra, over all copies
    invariance, moved: as in CheckReport
    """

    name: str
    kind: str
    copies: int
    dimension: int
    invariance: float
    moved: float


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`.

    Attributes
    ----------
    invariance: max |f(g p) - f(p)| / max |f(p)|, the largest over the samples
    moved: |g p - p| / |p|, the smallest over the samples
    tolerance: the largest invariance that is accepted
    groups: one row for each declared group, shift and flow
    """

    invariance: float
    moved: float
    tolerance: float
    groups: tuple[GroupReport, ...]

    @property
    def ok(self) -> bool:
        """The function stays and the parameters move, with finite numbers throughout."""
        finite = isfinite(self.invariance) and isfinite(self.moved)
        return finite and self.invariance <= self.tolerance and self.moved > _LEAST_MOTION

    def __str__(self) -> str:
        rows = [("group", "kind", "copies", "dimension", "invariance", "moved")]
        rows += [
            (
                row.name,
                row.kind,
                str(row.copies),
                str(row.dimension),
                f"{row.invariance:.1e}",
                f"{row.moved:.1e}",
            )
            for row in self.groups
        ]
        total = sum(row.dimension for row in self.groups)
        rows.append(("all", "", "", str(total), f"{self.invariance:.1e}", f"{self.moved:.1e}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            )
            for row in rows
        ]
        verdict = "ok" if self.ok else "FAILED"
        return "\n".join(
            [*lines, f"{verdict}: tolerance {self.tolerance:.0e}, least motion {_LEAST_MOTION:.0e}"]
        )


def check(
    symmetry: Symmetry,
    f: Function,
    params: Params,
    samples: int = 4,
    generator: torch.Generator | None = None,
    tolerance: float | None = None,
    by_group: bool = True,
) -> CheckReport:
    """Move the parameters by random elements and measure how much f changes.

    f: parameters -> a tensor or a tuple of tensors. tolerance: default 1e-6 in float64, 1e-3 otherwise.
    by_group: also try each group alone, for the rows of the report; without, f runs samples + 1 times.
    Raises SymmetryError if the declaration does not fit the parameters, ValueError for samples < 1.

    >>> from symgeo.groups import GeneralLinear
    >>> lora = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})
    >>> params = {"B": torch.randn(7, 2).double(), "A": torch.randn(2, 5).double()}
    >>> check(lora, lambda p: p["B"] @ p["A"], params).ok
    True
    >>> check(lora, lambda p: p["B"] @ p["A"].abs(), params).ok
    False
    """
    if samples < 1:
        raise ValueError(f"check needs samples >= 1, found {samples}")
    refuse_sharded(params, "gather them with full_tensor(), or check before fully_shard")
    action = symmetry.bind(params)
    with torch.no_grad():
        reference = _outputs(f, params)
        everything = [*action.groups, *action.shifts, *action.flows]
        total = _measure(action, f, params, reference, everything, samples, generator)
        rows = tuple(
            GroupReport(
                declared,
                *_describe(action, names),
                *_measure(action, f, params, reference, names, samples, generator),
            )
            for declared, names in _by_declared_name(action).items()
            if by_group
        )
    exact = all(x.dtype == torch.float64 for x in params.values() if x.is_floating_point())
    return CheckReport(*total, (1e-6 if exact else 1e-3) if tolerance is None else tolerance, rows)


def _outputs(f: Function, params: Params) -> tuple[Tensor, ...]:
    out = f(dict(params))
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _measure(
    action: Action,
    f: Function,
    params: Params,
    reference: tuple[Tensor, ...],
    names: list[str],
    samples: int,
    generator: torch.Generator | None,
) -> tuple[float, float]:
    """(invariance, moved) for elements in which only the given names are random."""
    errors, motions = [], []
    for _ in range(samples):
        for _ in range(_DRAWS):
            moved = action.act(action.random(generator, only=names), params)
            motion = _distance(moved, params)
            if not motion <= _LEAST_MOTION:
                break
        errors.append(_error(_outputs(f, moved), reference))
        motions.append(motion)
    finite = all(isfinite(x) for x in errors)
    return max(errors) if finite else nan, min(motions)


def _error(found: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> float:
    largest = max((float(x.abs().max()) for x in reference if x.numel()), default=0.0)
    change = max((float((x - y).abs().max()) for x, y in zip(found, reference) if y.numel()), default=0.0)
    if not all(bool(x.isfinite().all()) for x in (*found, *reference)):
        return nan
    return change / largest if largest else change


def _distance(moved: Params, params: Params) -> float:
    norm = sum(float(x.double().square().sum()) for x in params.values())
    change = sum(float((moved[name].double() - x.double()).square().sum()) for name, x in params.items())
    return (change / norm) ** 0.5 if norm else change**0.5


def row_names(action: Action) -> list[str]:
    """The names of the rows of a report."""
    return list(_by_declared_name(action))


def _by_declared_name(action: Action) -> dict[str, list[str]]:
    """Concrete names by declared name; names that differ in the number of a layer alone share a row."""
    rows: dict[str, list[str]] = {}
    for name in [*action.groups, *action.shifts, *action.flows]:
        rows.setdefault(_NUMBER.sub("*", action.declared[name]), []).append(name)
    return rows


def _describe(action: Action, names: list[str]) -> tuple[str, int, int]:
    """(kind, copies, dimension) of all elements behind one declared name."""
    if names[0] in action.shifts:
        return "Shift", len(names), sum(action.shifts[name].dimension for name in names)
    if names[0] in action.flows:
        kind = type(action.flows[names[0]]).__name__
        return kind, len(names), sum(action.coordinates[name] for name in names)
    copies = [torch.Size(action.copies[name]).numel() for name in names]
    dimension = sum(n * action.groups[name].dimension(action.sizes[name]) for n, name in zip(copies, names))
    return type(action.groups[names[0]]).__name__, sum(copies), dimension
