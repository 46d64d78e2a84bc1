"""The preconditioner of a model as a table for people and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import groupby, zip_longest
from operator import add
from typing import Any

from symgeo.preconditioner.kinds import Cost, Kind
from symgeo.report import aligned

HEADER = ("parameter", "shape", "axes", "groups", "kind", "layers", "blocks", "M", "d", "state", "/ weight",
          "statistics", "roots", "apply")
_LEFT = 5  # of these are words
_LINE = 110  # characters


@dataclass(frozen=True)
class Parameter:
    """A parameter, with a star for the number of its layer, and the pattern of what acts on its axes.

    count: how many of them (in `PreconditionerReport.rest`)
    """

    name: str
    shape: tuple[int, ...]
    axes: str = ""
    count: int = 1

    @property
    def size(self) -> int:
        """Entries of one of them."""
        return reduce(int.__mul__, self.shape, 1)

    @property
    def text(self) -> str:
        """The shape as "3 x 5"."""
        return " x ".join(map(str, self.shape)) or "1"


@dataclass(frozen=True)
class Layer:
    """Parameters that share statistics, and all layers like them.

    Attributes
    ----------
    parameters, groups: what they are and what acts on them, in words;  kinds: their isotypic blocks
    method: what this is known as;  layers: how many of this structure there are
    state: numbers kept by one of them, without momentum;  cost: of one of them
    """

    parameters: tuple[Parameter, ...]
    groups: tuple[str, ...]
    kinds: tuple[Kind, ...]
    method: str
    layers: int
    state: int
    cost: Cost

    @property
    def size(self) -> int:
        """Entries of the parameters of one of them."""
        return sum(p.size for p in self.parameters)

    def rows(self) -> list[list[str]]:
        """Lines of the table: parameters on the left, then groups, then kinds, as many as there are of each."""
        cost = [short(value) for value in (self.cost.statistics, self.cost.roots, self.cost.application)]
        left = [[p.name, p.text, p.axes] for p in self.parameters]
        middle = [[group] for group in self.groups]
        right = [[k.label, "", *map(str, (k.blocks, k.copies, k.dimension)), *[""] * 5] for k in self.kinds]
        right[0][1] = str(self.layers)
        right[0][5:] = [str(self.state), f"{self.state / self.size:.3g}", *cost]
        parts = zip_longest(left, middle, right)
        return [[*(a or [""] * 3), *(b or [""]), *(c or [""] * 10)] for a, b, c in parts]


@dataclass(frozen=True)
class PreconditionerReport:
    """What `describe` found.

    Attributes
    ----------
    layers: with a preconditioner;  rest: parameters that AdamW steps
    update_every: roots are renewed every so many steps;  compact: whether SymO needs compact=True
    """

    layers: tuple[Layer, ...]
    rest: tuple[Parameter, ...]
    update_every: int
    compact: bool

    @property
    def size(self) -> int:
        """Entries of all parameters with a preconditioner."""
        return sum(layer.layers * layer.size for layer in self.layers)

    @property
    def state(self) -> int:
        """Numbers kept for them, without momentum."""
        return sum(layer.layers * layer.state for layer in self.layers)

    @property
    def cost(self) -> Cost:
        """FLOPs of one step on them."""
        return reduce(add, (layer.cost * layer.layers for layer in self.layers), Cost())

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        layers = []
        for layer in self.layers:
            row = asdict(layer)
            for kind, source in zip(row["kinds"], layer.kinds):
                kind |= {"numbers": source.numbers, "method": source.method}
            layers.append(row | {"size": layer.size, "state_per_parameter": layer.state / layer.size})
        return {
            "layers": layers,
            "adamw": [asdict(p) for p in self.rest],
            "update_every": self.update_every,
            "compact": self.compact,
            "totals": {
                "parameters": self.size,
                "state": self.state,
                "state_per_parameter": self.state / self.size,
                "momentum": self.size,
                "flops": asdict(self.cost) | {"total": self.cost.total},
                "adamw_parameters": sum(p.count * p.size for p in self.rest),
            },
        }

    def __str__(self) -> str:
        rows = [row for layer in self.layers for row in layer.rows()]
        header, *lines = aligned(HEADER, rows, _LEFT).splitlines()
        text = [header]
        for method, same in groupby(self.layers, key=lambda layer: layer.method):
            count = sum(len(layer.rows()) for layer in same)
            text += [*lines[:count], f"  = {method}", ""]
            del lines[:count]
        return "\n".join([*text, *self._totals()])

    def _totals(self) -> list[str]:
        cost, every = self.cost, self.update_every
        lines = [
            f"state    {self.state} numbers for {self.size} parameters ({self.state / self.size:.3g} each), "
            "and momentum (1 each)",
            f"step     {short(cost.total)} FLOPs: statistics {short(cost.statistics)}, roots {short(cost.roots)} "
            f"(renewed every {f'{every} steps' if every > 1 else 'step'}), application {short(cost.application)}",
        ]
        if self.compact:
            lines.append("gauge    non-compact groups need SymO(..., compact=True), which balances them every step, at "
                         "a cost that is not in the table")
        if self.rest:
            entries = [f"{p.name} ({p.text}{f', {p.count} times' if p.count > 1 else ''})" for p in self.rest]
            lines.append(f"AdamW    {sum(p.count * p.size for p in self.rest)} parameters, 2 numbers each:")
            lines += wrapped(entries)
        return lines


def short(value: float) -> str:
    """A number with three digits and a unit.

    >>> [short(x) for x in (0, 24.3, 999.6, 4194304.0, 3.2e12)]
    ['0', '24.3', '1e+03', '4.19M', '3.2T']
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def wrapped(entries: Sequence[str]) -> list[str]:
    """Entries with commas between them, on lines of bounded length.

    >>> wrapped(["a", "b"])
    ['         a, b']
    """
    lines = [""]
    for entry in entries:
        if lines[-1] and len(lines[-1]) + len(entry) > _LINE:
            lines.append("")
        lines[-1] += f"{', ' if lines[-1] else ''}{entry}"
    return [f"         {line}" for line in lines]
