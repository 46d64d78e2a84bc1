"""One function, many parameters: what stands still along a gauge orbit, and what does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from symgeo.functional import Params
from symgeo.groups import GeneralLinear
from symgeo.parallel import spread
from symgeo.study import Candidate, measure_one
from symgeo.symmetry import Action, Element

MEASURES = ("adaptive", "geodesic inv", "geodesic mix")


@dataclass(frozen=True)
class Orbit:
    """Sharpness and outputs at points of one orbit, against the trained parameters.

    conditions : condition number of the gauge change at each point
    start : the sharpness of the trained parameters, by measure
    sharpness : the sharpness at each point, by measure
    output_change : the largest change of an output at each point, relative to the largest output
    moved : how far each point is away, relative to the norm of the parameters
    """

    rho: float
    conditions: tuple[float, ...]
    start: dict[str, float]
    sharpness: dict[str, tuple[float, ...]]
    output_change: tuple[float, ...]
    moved: tuple[float, ...]

    def relative(self, measure: str) -> list[float]:
        """The sharpness at each point, divided by that of the trained parameters."""
        return [value / self.start[measure] for value in self.sharpness[measure]]

    def change(self, measure: str) -> list[float]:
        """The relative change of the sharpness at each point."""
        return [abs(ratio - 1) for ratio in self.relative(measure)]


@dataclass(frozen=True)
class Point:
    """One point of an orbit, made and measured in whichever process; the start where ``condition`` is None."""

    load: Callable[[], Candidate]
    outputs: Callable[[Candidate, Params], Tensor]
    condition: float | None
    rho: float
    steps: int
    seed: int

    def measure(self) -> tuple[dict[str, float], float, float]:
        """Sharpness by measure, change of the outputs, and distance from the start."""
        start = self.load()
        here = self._move(start)
        sharpness = {m: measure_one(here, m, self.rho, self.steps, self.seed).value for m in MEASURES}
        with torch.no_grad():
            before, after = self.outputs(start, start.params), self.outputs(start, here.params)
        change = float((after - before).abs().max() / before.abs().max())
        return sharpness, change, _distance(here.params, start.params)

    def _move(self, start: Candidate) -> Candidate:
        if self.condition is None:
            return start
        if start.symmetry is None:
            raise ValueError(f"{start.name}: needed a symmetry, without which there is no orbit")
        action = start.symmetry.bind(start.params)
        element = gauge_change(action, self.condition, torch.Generator().manual_seed(self.seed))
        return replace(start, params=action.act(element, start.params))


def follow(
    load: Callable[[], Candidate],
    outputs: Callable[[Candidate, Params], Tensor],
    conditions: Sequence[float],
    rho: float,
    steps: int,
    seed: int = 0,
    workers: int = 1,
) -> Orbit:
    """Move a candidate by gauge changes of growing condition number, and measure at every point.

    ``outputs(candidate, params)`` is the function that the orbit must leave alone.  Raises ``ValueError``
    without a symmetry.
    """
    settings = dict(enumerate([None, *conditions]))
    points = {str(i): Point(load, outputs, condition, rho, steps, seed + i) for i, condition in settings.items()}
    found = dict(spread(Point.measure, points, workers))
    start, *moved = (found[name] for name in points)
    return Orbit(
        rho,
        tuple(conditions),
        start[0],
        {measure: tuple(sharpness[measure] for sharpness, _, _ in moved) for measure in MEASURES},
        tuple(change for _, change, _ in moved),
        tuple(distance for _, _, distance in moved),
    )


def gauge_change(action: Action, condition: float, generator: torch.Generator) -> Element:
    """A random element of the GL groups of all heads: every matrix has this condition number and determinant ±1.

    A = Q1 diag(s) Q2,  with s from sqrt(condition) down to 1 / sqrt(condition) in equal ratios.
    """
    return action.element(
        {
            name: _matrices((*action.copies[name], action.sizes[name]), condition, generator).to(action.device)
            for name, group in action.groups.items()
            if isinstance(group, GeneralLinear) and action.sizes[name] > 1
        }
    )


def _matrices(shape: tuple[int, ...], condition: float, generator: torch.Generator) -> Tensor:
    half = math.log10(condition) / 2
    scales = torch.logspace(half, -half, shape[-1], dtype=torch.float64)
    left, right = (
        torch.linalg.qr(torch.randn(*shape, shape[-1], dtype=torch.float64, generator=generator)).Q for _ in range(2)
    )
    return left * scales @ right


def _distance(point: Params, start: Params) -> float:
    squares = [(float((point[name] - x).square().sum()), float(x.square().sum())) for name, x in start.items()]
    return math.sqrt(math.fsum(a for a, _ in squares) / math.fsum(b for _, b in squares))
