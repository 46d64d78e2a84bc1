"""Coordinates of a module's own parameters, chunk by chunk: points are written into the module, gradients read from it.

The metric is a sum over parameters that no factor pair connects, so that every chunk has a chart of its own, and what
autograd keeps of the exponential map is that of one chunk.  Under ``fully_shard`` the chart of a process holds its own
parts of the parameters that are in no pair, and whole pairs that it owns: those travel to it and back.  Where
several processes hold the same part, the first of them counts it.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from symgeo.chart import Chart
from symgeo.distributed import Exchange, Processes, is_sharded, local, longest_first
from symgeo.distributed.shards import Box, boxes
from symgeo.distributed.shards import whole as entire
from symgeo.functional import Params
from symgeo.geometry import ParameterManifold
from symgeo.groups import GeneralLinear, Rotary
from symgeo.kernels import inner_products
from symgeo.symmetry import Symmetry

#: bytes of the parameters of one chunk in double precision, unless a single unit has more; of one reduced message
CHUNK_BYTES = 2**27


@dataclass(frozen=True)
class Metric:
    """Which metric: see :class:`symgeo.ParameterManifold`."""

    symmetry: Symmetry | None
    metric: str
    rest: str
    eps: float


class Chunks:
    """What :class:`symgeo.chart.Chart` is for a dict of tensors, for the parameters of a module where they are.

    Parameters
    ----------
    params: the parameters that move, by name; constants: names of all others, which no group may move
    team: the processes that share the work, or None; size: bytes of a chunk

    Raises ``ValueError`` as :class:`symgeo.ParameterManifold` does.
    """

    def __init__(
        self, params: Mapping[str, Tensor], constants: Mapping[str, Tensor], metric: Metric, team: Processes | None,
        size: int = CHUNK_BYTES,
    ) -> None:
        self.params, self.team = dict(params), team
        self.sharded = any(is_sharded(p) for p in params.values())
        self.dtype = functools.reduce(torch.promote_types, (p.dtype for p in params.values()), torch.float32)
        self.device = local(next(iter(params.values()))).device
        units = _units(metric.symmetry, params, constants)
        spread = self.sharded and team is not None
        self._boxes = boxes(params, team) if spread and team is not None else {}
        self._exchange = self._owners(units) if spread else None
        values = self._held()
        symmetry = units[0].symmetry
        if symmetry is not None:
            paired = {name for unit in units if unit.pair for name in unit.names}
            symmetry = symmetry.without(symmetry.tensors.keys() - paired)
        kinds = [[unit for unit in units if unit.pair],
                 [unit for unit in units if not unit.pair and self._first(unit)],
                 [unit for unit in units if not unit.pair and not self._first(unit)]]
        with self._alike():
            charts = [[_chart(symmetry, {name: values[name] for name in names}, metric)
                       for names in _grouped(kind, values, size)] for kind in kinds]
        self._pairs, self._charts = len(charts[0]), [chart for kind in charts for chart in kind]
        counted = [*charts[0], *charts[1]]
        self._counted = sum(chart.size for chart in counted)  # of the coordinates the first ones: copies follow
        counts = [sum(getattr(chart, what) for chart in counted) for what in ("pairs", "relaxed", "zeros")]
        if self._exchange is not None and team is not None:
            counts = [sum(column) for column in zip(*team.gather(counts))]
        self.pairs, self.relaxed, self.zeros = counts

    def origin(self) -> Tensor:
        """The coordinates of the point itself."""
        return torch.zeros(sum(chart.size for chart in self._charts), dtype=self.dtype, device=self.device)

    def random(self, generator: torch.Generator) -> Tensor:
        """Standard normal coordinates, horizontal; of a generator in the same state on all processes.

        Every part of a parameter has numbers of its own, the same on all processes that hold it.
        """
        (draw,) = torch.randint(2**62, (1,), generator=generator).tolist()
        draws = []
        for number, chart in enumerate(self._charts):
            if number < self._pairs:  # in one process only
                z = chart.random(_generator(draw, *chart.order))
            else:
                parts = [(name, self._box(name)) for name in chart.order]
                numbers = [torch.randn(box.size, dtype=chart.dtype, generator=_generator(draw, name, box.offset))
                           for name, box in parts]
                z = chart.project(torch.cat(numbers).to(self.device))
            draws.append(z.to(self.dtype))
        return torch.cat(draws) if draws else self.origin()

    def inner(self, vectors: Sequence[Tensor]) -> Tensor:
        """Inner products of all pairs, over all processes; what several of them hold counts once."""
        if self._exchange is None or self.team is None:
            return inner_products(vectors)
        return self.team.sum_(inner_products([v[: self._counted] for v in vectors]))

    @torch.no_grad()
    def write(self, z: Tensor, method: str, bound: float | None) -> None:
        """Put the module at the end of the geodesic with coordinates ``z``, in the balanced gauge."""
        owned: Params = {}
        with self._alike():
            for chart, piece in self._pieces(z):
                for name, x in chart.point(piece.to(chart.dtype), method, bound=bound).items():
                    if self._exchange is not None and name in self._exchange.owner:
                        owned[name] = x
                    else:
                        local(self.params[name]).copy_(x)
        if self._exchange is not None:
            for name, x in self._exchange.spread(owned, self._exchange.owner, self.dtype).items():
                local(self.params[name]).copy_(x)

    def pull(self, z: Tensor, method: str, bound: float | None) -> Tensor:
        """The horizontal gradient at ``z`` from the gradients that the module has."""
        grads = self._gradients()
        with self._alike():
            pulled = [self._pulled(chart, piece, grads, method, bound) for chart, piece in self._pieces(z)]
        return torch.cat(pulled) if pulled else self.origin()

    def _pulled(
        self, chart: Chart, piece: Tensor, grads: Mapping[str, Tensor], method: str, bound: float | None
    ) -> Tensor:
        leaf = piece.to(chart.dtype).detach().requires_grad_()
        with torch.enable_grad():
            point = chart.point(leaf, method, bound=bound)
        names = [name for name in point if name in grads and point[name].requires_grad]
        if not names:
            return torch.zeros_like(leaf, dtype=self.dtype)
        (slope,) = torch.autograd.grad([point[n] for n in names], leaf, [grads[n].to(point[n]) for n in names])
        return chart.project(slope).to(self.dtype)

    @contextmanager
    def kept(self) -> Iterator[Callable[[], None]]:
        """A context that gives back the parameters and their gradients as they were, bit for bit.

        What it yields gives the parameters back at once.
        """
        values = {name: local(p).detach().clone() for name, p in self.params.items()}
        grads = {name: p.grad for name, p in self.params.items()}

        @torch.no_grad()
        def restore() -> None:
            for name, p in self.params.items():
                local(p).copy_(values[name])

        try:
            yield restore
        finally:
            restore()
            for name, p in self.params.items():
                p.grad = grads[name]

    def _pieces(self, z: Tensor) -> Iterator[tuple[Chart, Tensor]]:
        return zip(self._charts, z.split([chart.size for chart in self._charts]))

    def _owners(self, units: Sequence[_Unit]) -> Exchange:
        pairs = {i: float(sum(math.prod(self.params[n].shape) for n in u.names)) for i, u in enumerate(units) if u.pair}
        assert self.team is not None
        owner = longest_first(pairs, self.team.size)
        names = {name: owner[i] for i in owner for name in units[i].names}
        return Exchange(self.team, {name: self.params[name] for name in names}, names, self._boxes)

    def _alike(self) -> AbstractContextManager[None]:
        """Work of which every process has its share, and in which one may fail: then all stop."""
        return nullcontext() if self._exchange is None or self.team is None else self.team.together(self.device)

    def _box(self, name: str) -> Box:
        """The part of a parameter that this process holds."""
        return entire(self.params[name]) if self.team is None or not self._boxes else self._boxes[name][self.team.rank]

    def _first(self, unit: _Unit) -> bool:
        """Whether no process before this one holds the same part of it."""
        if self.team is None or not self._boxes:
            return True
        (name,) = unit.names
        return self._boxes[name].index(self._box(name)) == self.team.rank

    def _held(self) -> dict[str, Tensor]:
        """The values that this process works on."""
        values = {name: local(p).detach() for name, p in self.params.items()}
        if self._exchange is None:
            return values
        whole = self._exchange.collect({n: self.params[n].detach() for n in self._exchange.owner}, self._dtype_of)
        return {name: whole.get(name, x) for name, x in values.items()
                if name in whole or name not in self._exchange.owner}

    def _gradients(self) -> dict[str, Tensor]:
        """Gradients of the mean loss of all processes, of what this process works on.

        Raises ``ValueError`` where no process has any.
        """
        grads = {name: p.grad for name, p in self.params.items()}
        found_any = any(g is not None for g in grads.values())
        if not (found_any if self.team is None else any(row[0] for row in self.team.bits([found_any]))):
            raise ValueError(
                "model: the backward pass left no parameter a gradient; needed .grad of those that move. Remove hooks "
                "that clear gradients (an optimizer step within the backward pass), or a loss that has its own"
            )
        if self.team is not None and not self.sharded:
            for name, p in self.params.items():  # a process whose data do not reach a parameter joins all the same
                grads[name] = torch.zeros_like(p) if p.grad is None else p.grad
            self._reduce([g for g in grads.values() if g is not None])
        found = {name: local(g) for name, g in grads.items() if g is not None}
        if self._exchange is None:
            return found
        have = {name: [True] * self._exchange.team.size for name in self._exchange.owner}
        whole = self._exchange.collect({name: grads[name] for name in self._exchange.owner}, self._dtype_of, have)
        return {name: g for name, g in found.items() if name not in self._exchange.owner} | whole

    def _reduce(self, grads: Sequence[Tensor]) -> None:
        """The mean over processes, in place, in flat messages of the size of a chunk."""
        assert self.team is not None
        for group in _by_size(grads):
            flat = self.team.mean_(torch.cat([g.reshape(-1) for g in group]))
            for g, piece in zip(group, flat.split([g.numel() for g in group])):
                g.copy_(piece.reshape(g.shape))

    def _dtype_of(self, name: str) -> torch.dtype:
        return self.params[name].dtype


@dataclass(frozen=True)
class _Unit:
    """Parameters that stay in one chunk; of pairs, whose declaration is there too."""

    names: tuple[str, ...]
    pair: bool
    symmetry: Symmetry | None


def _units(symmetry: Symmetry | None, params: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> list[_Unit]:
    """The parameters of connected factor pairs, and every other one alone, in order."""
    if symmetry is None:
        return [_Unit((name,), False, None) for name in params]
    whole = {**params, **constants}
    linear = replace(symmetry, shifts={}, flows={}).concrete(whole).without(constants)
    action = linear.bind(params)
    unit_of: dict[str, list[str]] = {name: [name] for name in params}
    paired: set[str] = set()
    for name, group in action.groups.items():
        if not isinstance(group, GeneralLinear | Rotary):
            continue
        touched = list(dict.fromkeys(block.parameter for block in action.blocks(name)))
        paired |= set(touched)
        joined = list(dict.fromkeys(n for parameter in touched for n in unit_of[parameter]))
        unit_of |= {n: joined for n in joined}
    units = {tuple(unit_of[name]): None for name in params}
    return [_Unit(names, names[0] in paired, linear) for names in units]


def _grouped(units: Sequence[_Unit], values: Mapping[str, Tensor], size: int) -> Iterator[list[str]]:
    """Names of neighbouring units, up to a number of bytes."""
    group: list[str] = []
    filled = 0
    for unit in units:
        names = [name for name in unit.names if name in values]
        more = sum(values[name].numel() * 8 for name in names)
        if group and filled + more > size:
            yield group
            group, filled = [], 0
        group, filled = group + names, filled + more
    if group:
        yield group


def _by_size(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, up to the size of a chunk."""
    group: list[Tensor] = []
    for x in tensors:
        if group and (x.dtype != group[0].dtype or sum(y.nbytes for y in group) + x.nbytes > CHUNK_BYTES):
            yield group
            group = []
        group.append(x)
    if group:
        yield group


def _generator(*key: object) -> torch.Generator:
    """One with a seed that the key gives, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _chart(symmetry: Symmetry | None, values: Params, metric: Metric) -> Chart:
    here = None
    if symmetry is not None:
        found = symmetry.without(symmetry.tensors.keys() - values.keys())
        here = found if found.groups else None
    chart = ParameterManifold(values, here, metric.metric, metric.rest, metric.eps).chart(values)
    chart.exact = {}  # in double precision, and of use for tangent vectors in the gauge that was given only
    return chart
