"""Coordinates of a module's own parameters, chunk by chunk: points are written into the module, gradients read from it.

The metric is a sum over parameters that no factor pair connects, so that every chunk has a chart of its own, and what
autograd keeps of the exponential map is that of one chunk.  Under ``fully_shard`` the chart of a process holds its own
parts of the parameters that are in no pair, and whole pairs that it owns: those travel to it and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from symgeo.chart import Chart
from symgeo.distributed import Exchange, Processes, is_sharded, local, longest_first
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
        units = _units(metric.symmetry, params, constants)
        self._exchange = self._owners(units) if self.sharded and team is not None else None
        values = self._held()
        symmetry = units[0].symmetry
        if symmetry is not None:
            paired = {name for unit in units if unit.pair for name in unit.names}
            symmetry = symmetry.without(symmetry.tensors.keys() - paired)
        self._charts = [_chart(symmetry, {name: values[name] for name in names}, metric)
                        for names in _grouped(units, values, size)]
        self.dtype = max((chart.dtype for chart in self._charts), key=lambda d: d.itemsize, default=torch.float32)
        self.device = local(next(iter(params.values()))).device
        counts = [sum(getattr(chart, what) for chart in self._charts) for what in ("pairs", "relaxed", "zeros")]
        if self._exchange is not None and team is not None:
            counts = [sum(column) for column in zip(*team.gather(counts))]
        self.pairs, self.relaxed, self.zeros = counts

    def origin(self) -> Tensor:
        """The coordinates of the point itself."""
        return torch.zeros(sum(chart.size for chart in self._charts), dtype=self.dtype, device=self.device)

    def random(self, generator: torch.Generator) -> Tensor:
        """Standard normal coordinates, horizontal."""
        draws = [chart.random(generator).to(self.dtype) for chart in self._charts]
        return torch.cat(draws) if draws else self.origin()

    def inner(self, vectors: Sequence[Tensor]) -> Tensor:
        """Inner products of all pairs, over all processes that hold a part."""
        found = inner_products(vectors)
        return found if self._exchange is None or self.team is None else self.team.sum_(found)

    @torch.no_grad()
    def write(self, z: Tensor, method: str, bound: float | None) -> None:
        """Put the module at the end of the geodesic with coordinates ``z``, in the balanced gauge."""
        owned: Params = {}
        for chart, piece in self._pieces(z):
            for name, x in chart.point(piece.to(chart.dtype), method, bound=bound).items():
                if self._exchange is not None and name in self._exchange.owner:
                    owned[name] = x
                else:
                    local(self.params[name]).copy_(x)
        if self._exchange is not None:
            for name, x in self._exchange.spread(owned, self._exchange.owner, self._wire()).items():
                local(self.params[name]).copy_(x)

    def pull(self, z: Tensor, method: str, bound: float | None) -> Tensor:
        """The horizontal gradient at ``z`` from the gradients that the module has."""
        grads = self._gradients()
        pulled = []
        for chart, piece in self._pieces(z):
            leaf = piece.to(chart.dtype).detach().requires_grad_()
            with torch.enable_grad():
                point = chart.point(leaf, method, bound=bound)
            names = [name for name in point if name in grads and point[name].requires_grad]
            if names:
                (slope,) = torch.autograd.grad([point[n] for n in names], leaf, [grads[n].to(point[n]) for n in names])
                pulled.append(chart.project(slope).to(self.dtype))
            else:
                pulled.append(torch.zeros_like(leaf, dtype=self.dtype))
        return torch.cat(pulled) if pulled else self.origin()

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
        return Exchange(self.team, {name: self.params[name] for name in names}, names)

    def _held(self) -> dict[str, Tensor]:
        """The values that this process works on."""
        values = {name: local(p).detach() for name, p in self.params.items()}
        if self._exchange is None:
            return values
        whole = self._exchange.collect({n: self.params[n].detach() for n in self._exchange.owner}, self._dtype_of)
        return {name: whole.get(name, x) for name, x in values.items()
                if name in whole or name not in self._exchange.owner}

    def _gradients(self) -> dict[str, Tensor]:
        """Gradients of the mean loss of all processes, of what this process works on."""
        grads = {name: p.grad for name, p in self.params.items()}
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

    def _wire(self) -> torch.dtype:
        dtype = torch.float32
        for p in self.params.values():
            dtype = torch.promote_types(dtype, p.dtype)
        return dtype


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


def _chart(symmetry: Symmetry | None, values: Params, metric: Metric) -> Chart:
    here = None
    if symmetry is not None:
        found = symmetry.without(symmetry.tensors.keys() - values.keys())
        here = found if found.groups else None
    chart = ParameterManifold(values, here, metric.metric, metric.rest, metric.eps).chart(values)
    chart.exact = {}  # in double precision, and of use for tangent vectors in the gauge that was given only
    return chart
