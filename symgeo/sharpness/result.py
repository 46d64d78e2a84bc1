"""What a sharpness measurement returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from symgeo.functional import Params


@dataclass(frozen=True)
class SharpnessResult:
    """A sharpness with everything needed to judge it.

    value : mean over batches of the attained increase of the loss
    per_batch : the increase of each batch, each with its own perturbation
    base_losses : the loss of each batch at the parameters
    history : per batch, the loss at every evaluation (the first is the unperturbed one)
    perturbations : per batch, the tangent vector that attains the increase (with ``keep=True``)
    rho, kind, geodesic, steps : what was asked for
    pairs : number of factor pairs quotiented;  relaxed : how many of them lack full rank
    zeros : parameters left out because they are exactly zero under the adaptive metric
    left_domain : evaluations beyond the domain of the metric (or with a loss that is not finite), rejected
    resolution : what rounding alone may change the mean loss by; a smaller value means nothing
    standard_error : of the mean, for sampled sharpness
    """

    value: float
    per_batch: list[float]
    base_losses: list[float]
    rho: float
    kind: str
    geodesic: str
    steps: int
    pairs: int = 0
    relaxed: int = 0
    zeros: int = 0
    left_domain: int = 0
    resolution: float = 0.0
    standard_error: float | None = None
    history: list[list[float]] = field(default_factory=list, repr=False)
    perturbations: list[Params] | None = field(default=None, repr=False)

    @property
    def warnings(self) -> list[str]:
        """Remarks on the numerics, in words."""
        notes = []
        if self.relaxed:
            notes.append(f"{self.relaxed} of {self.pairs} pairs lack full rank: covariant relaxation, straight lines")
        if self.zeros:
            notes.append(f"{self.zeros} parameters are exactly zero and were left out of the adaptive metric")
        if self.left_domain:
            notes.append(f"{self.left_domain} evaluations left the domain of the metric and were rejected")
        if self.rho > 0 and abs(self.value) <= self.resolution:
            notes.append(f"the value is below the rounding of the loss, {self.resolution:.1e}: use float64 or more rho")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable: everything but the perturbations."""
        names = ("value", "per_batch", "base_losses", "rho", "kind", "geodesic", "steps", "pairs", "relaxed",
                 "zeros", "left_domain", "resolution", "standard_error", "history", "warnings")
        return {name: getattr(self, name) for name in names}


def check_rho(rho: float) -> float:
    """``rho`` as a float, or ``ValueError`` when it is negative, NaN or infinite."""
    value = float(rho)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"rho must be a finite number >= 0; got {rho}")
    return value


def check_count(name: str, value: int) -> int:
    """A positive integer argument."""
    if int(value) != value or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value}")
    return int(value)
