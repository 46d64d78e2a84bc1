"""One function, many parameters: what stands still along a gauge orbit, and what does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from symgeo.functional import Params
from symgeo.groups import GeneralLinear
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


def follow(
    candidate: Candidate,
    outputs: Callable[[Params], Tensor],
    conditions: Sequence[float],
    rho: float,
    steps: int,
    seed: int = 0,
) -> Orbit:
    """Move a candidate by gauge changes of growing condition number, and measure at every point.

    ``outputs`` is the function that the orbit must leave alone.  Raises ``ValueError`` without a symmetry.
    """
    if candidate.symmetry is None:
        raise ValueError(f"{candidate.name}: needed a symmetry, without which there is no orbit")
    action = candidate.symmetry.bind(candidate.params)
    generator = torch.Generator().manual_seed(seed)
    elements = [gauge_change(action, condition, generator) for condition in conditions]
    points = [action.act(element, candidate.params) for element in elements]

    def sharpness(params: Params, measure: str) -> float:
        return measure_one(replace(candidate, params=params), measure, rho, steps, seed).value

    with torch.no_grad():
        reference = outputs(candidate.params)
        change = [float((outputs(p) - reference).abs().max() / reference.abs().max()) for p in points]
    return Orbit(
        rho,
        tuple(conditions),
        {measure: sharpness(candidate.params, measure) for measure in MEASURES},
        {measure: tuple(sharpness(p, measure) for p in points) for measure in MEASURES},
        tuple(change),
        tuple(_distance(p, candidate.params) for p in points),
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
