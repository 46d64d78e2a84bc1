"""The options of the optimizer that are the same for all groups of parameters, checked."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch

from symgeo.curvature.estimators import ESTIMATORS, TRIVIAL
from symgeo.kernels.batched import NEWTON_POWERS
from symgeo.optim.graft import GRAFTS

DIVERGENCES = ("frobenius", "kl")
ROOTS = ("auto", "eigh", "newton", "group")


@dataclass(frozen=True)
class Options:
    """What `SymO` was asked for, apart from learning rates, betas and weight decay.

    sides: the number of symmetries, 1 or 2.  Raises ValueError naming the option that does not fit.
    """

    sides: int
    damping: float
    estimator: str
    update_every: int
    trivial: str
    nesterov: bool
    compact: bool
    power: float
    graft: str | None
    divergence: str
    roots: str
    corrected: bool = False

    def __post_init__(self) -> None:
        _one_of("estimator", self.estimator, ESTIMATORS)
        _one_of("trivial", self.trivial, TRIVIAL)
        _one_of("graft", self.graft, (None, *GRAFTS))
        _one_of("divergence", self.divergence, DIVERGENCES)
        _one_of("roots", self.roots, ROOTS)
        if not (isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping must be finite and >= 0; got {self.damping}")
        if not isinstance(self.update_every, int) or self.update_every < 1:
            raise ValueError(f"update_every must be a whole number >= 1; got {self.update_every!r}")
        if not (isfinite(self.power) and self.power > 0):
            raise ValueError(f"power must be finite and > 0; got {self.power}")
        problems = (
            self._pair_problem, self._estimator_problem, self._roots_problem, self._compact_problem,
            self._corrected_problem,
        )
        for problem in filter(None, (found() for found in problems)):
            raise ValueError(problem)

    def method(self, device: torch.device) -> str:
        """How inverse powers are computed: "eigh" or "newton" (where batched eigh is a loop over the matrices)."""
        if self.roots == "auto":
            able = self.estimator == "gradient" and -self.side_power in NEWTON_POWERS and not self.corrected
            return "newton" if able and device.type != "cpu" else "eigh"
        return self.roots

    @property
    def needs_weights(self) -> bool:
        """Whether steps depend on the parameters themselves, and not on gradients alone."""
        return self.compact or self.estimator != "gradient"

    @property
    def side_power(self) -> float:
        """The exponent of each symmetry: `power`, shared by the two of a pair."""
        return self.power / self.sides

    def _pair_problem(self) -> str:
        if self.sides == 1:
            return ""
        if self.estimator != "gradient":
            return f"estimator={self.estimator!r} needs one symmetry; the mean of a pair is known for 'gradient' only"
        if self.roots == "group":
            return "roots='group' needs one symmetry: its step is the whole inverse, which a pair would take twice"
        if self.divergence == "kl" and self.power != 1 and not self.corrected:
            return ("divergence='kl' with a pair fits the covariance itself, and needs power=1 (each side to the power"
                    f" -1/2); got power={self.power}")
        return ""

    def _estimator_problem(self) -> str:
        if self.estimator != "gradient" and self.power != 0.5:
            return f"power must be 0.5 with estimator={self.estimator!r}, which is a Hessian; got {self.power}"
        if self.estimator != "gradient" and self.roots in ("newton", "group"):
            return f"roots={self.roots!r} needs estimator='gradient'; {self.estimator!r} needs eigenvalues"
        if self.roots == "group" and self.power != 1:
            return f"roots='group' tracks the inverse of the second moments and needs power=1; got {self.power}"
        if self.roots == "group" and self.update_every != 1:
            return f"roots='group' updates its roots every step; got update_every={self.update_every}"
        return ""

    def _roots_problem(self) -> str:
        if self.roots == "newton" and -self.side_power not in NEWTON_POWERS:
            return (f"power: roots='newton' finds the powers -1/4, -1/2 and -1, and power={self.power} asks every"
                    f" symmetry for -{self.side_power:g}; use roots='eigh'")
        return ""

    def _compact_problem(self) -> str:
        if self.compact and self.sides == 2:
            return "compact=True needs one symmetry: the two of a pair would have two gauges"
        if self.compact and self.graft == "adam":
            return "graft='adam' depends on the gauge; with compact=True use graft='sgd' or None"
        return ""

    def _corrected_problem(self) -> str:
        if not self.corrected:
            return ""
        if self.estimator != "gradient":
            return f"corrected=True averages squared gradients and needs estimator='gradient'; got {self.estimator!r}"
        if self.roots in ("newton", "group"):
            return f"corrected=True needs eigenvectors, which roots={self.roots!r} does not find; use roots='eigh'"
        if self.graft is not None:
            return f"corrected=True has the length of Adam's step in its basis by itself; got graft={self.graft!r}"
        return ""


def _one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
