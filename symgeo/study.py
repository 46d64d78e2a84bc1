"""Sharpness against generalization gaps over many models, as rank correlations with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from symgeo.functional import Loss, Params
from symgeo.geometry import ParameterManifold
from symgeo.parallel import spread
from symgeo.report import aligned
from symgeo.sharpness import (
    SharpnessResult,
    adaptive_sharpness,
    euclidean_sharpness,
    geodesic_sharpness,
    kendall,
)
from symgeo.sharpness.result import check_rho
from symgeo.symmetry import Symmetry

MEASURES = ("euclidean", "adaptive", "geodesic inv", "geodesic mix")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Candidate:
    """One trained model: the loss, the parameters, the batches its sharpness is measured on, and its gaps.

    gaps : the generalization gaps by name, for example {"loss gap": 0.4, "error gap": 0.1}
    symmetry : what the geodesic measures quotient; None for nothing
    """

    name: str
    loss: Loss
    params: Params
    batches: Sequence[Any]
    gaps: Mapping[str, float]
    symmetry: Symmetry | None = None


@dataclass(frozen=True)
class Lazy:
    """A candidate that is loaded where and when it is measured; ``load`` is picklable if there are workers."""

    name: str
    load: Callable[[], Candidate]


@dataclass(frozen=True)
class Measurement:
    """The sharpness of one model by one measure at one radius; ``value`` is None for the ``reason`` given."""

    model: str
    measure: str
    rho: float
    value: float | None
    reason: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Correlation:
    """Kendall's tau of one measure at one radius with one gap, over ``n`` models; None for the ``reason`` given."""

    measure: str
    rho: float
    gap: str
    n: int
    tau: float | None = None
    low: float | None = None
    high: float | None = None
    pvalue: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.tau is None:
            return "-"
        return f"{self.tau:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Study:
    """What :func:`study` found. ``str()`` is a table of the correlations; ``failures`` names what was left out."""

    gaps: dict[str, dict[str, float]]
    measurements: tuple[Measurement, ...]
    correlations: tuple[Correlation, ...] = field(default=())

    @property
    def failures(self) -> list[str]:
        """One line for every model that failed throughout, for every other measurement without a value, and for
        every gap that is not finite."""
        reasons: dict[str, set[str]] = {}
        for m in self.measurements:
            reasons.setdefault(m.model, set()).add(m.reason if m.value is None else "")
        whole = {model: found.pop() for model, found in reasons.items() if len(found) == 1 and found != {""}}
        lines = [f"{model}: {reason}" for model, reason in whole.items()]
        lines += [
            f"{m.model}, {m.measure} at rho {m.rho:g}: {m.reason}"
            for m in self.measurements
            if m.value is None and m.model not in whole
        ]
        return lines + [
            f"{model}, {name}: {value}, which is not finite"
            for model, gaps in self.gaps.items()
            for name, value in gaps.items()
            if not math.isfinite(value)
        ]

    def values(self, measure: str, rho: float) -> dict[str, float]:
        """The sharpness by model, where it was measured."""
        rows = (m for m in self.measurements if m.measure == measure and m.rho == rho)
        return {m.model: m.value for m in rows if m.value is not None}

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "models": [{"name": name, "gaps": gaps} for name, gaps in self.gaps.items()],
            "measurements": [vars(m) for m in self.measurements],
            "correlations": [vars(c) for c in self.correlations],
            "failures": self.failures,
        }

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of correlations: one row for each measure and radius."""
        names = list(dict.fromkeys(c.gap for c in self.correlations))
        cells: dict[tuple[str, float], list[Correlation]] = {}
        for c in self.correlations:
            cells.setdefault((c.measure, c.rho), []).append(c)
        body = [
            [measure, f"{rho:g}", *(str(c) for c in found), str(min(c.n for c in found))]
            for (measure, rho), found in cells.items()
        ]
        return ["measure", "rho", *(f"tau, {name}" for name in names), "n"], body

    def __str__(self) -> str:
        return aligned(*self.rows())


def study(
    models: Sequence[Candidate | Lazy],
    rhos: Iterable[float] | Mapping[str, Iterable[float]],
    measures: Sequence[str] = MEASURES,
    steps: int = 20,
    seed: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
) -> Study:
    """Measure every model by every measure at every radius, and correlate with every gap.

    The same radius means different things to different measures: ``rhos`` may give each its own.  A measurement
    that fails (a loss that is not finite, a model that does not load) is kept, with the reason in place of the
    value; the correlations are over the others and say how many these were.

    Args:
        workers: processes, of one thread each. More than 1 need picklable models, such as :class:`Lazy` ones
            with a module-level function; scripts then guard by ``if __name__ == "__main__"``.
        progress: called as ``progress(done, total, name)`` after every model.

    Raises:
        ValueError: no models, two of one name, an unknown measure, a radius that is negative or not finite.
    """
    plan = _plan(rhos, measures)
    names = [model.name for model in models]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"models: needed at least one, all with different names; found {', '.join(names) or 'none'}")
    found: dict[str, tuple[dict[str, float], list[Measurement]]] = {}
    for name, result in spread(
        partial(_measure_model, plan=plan, steps=steps, seed=seed), dict(zip(names, models)), workers
    ):
        found[name] = result
        if progress is not None:
            progress(len(found), len(names), name)
    gaps = {name: found[name][0] for name in names}
    measurements = tuple(m for name in names for m in found[name][1])
    partial_study = Study(gaps, measurements)
    return Study(gaps, measurements, tuple(_correlations(partial_study, plan, seed)))


def _plan(rhos: Iterable[float] | Mapping[str, Iterable[float]], measures: Sequence[str]) -> list[tuple[str, float]]:
    unknown = [m for m in measures if m not in MEASURES]
    if unknown or not measures:
        raise ValueError(f"measures: needed some of {', '.join(MEASURES)}; found {', '.join(unknown) or 'none'}")
    shared = None if isinstance(rhos, Mapping) else list(rhos)
    by_measure = rhos if isinstance(rhos, Mapping) else {m: shared or [] for m in measures}
    plan = [(m, check_rho(rho)) for m in measures for rho in by_measure.get(m, ())]
    if not plan:
        raise ValueError("rhos: needed at least one radius")
    return plan


def _measure_model(
    model: Candidate | Lazy, plan: Sequence[tuple[str, float]], steps: int, seed: int
) -> tuple[dict[str, float], list[Measurement]]:
    try:
        candidate = model.load() if isinstance(model, Lazy) else model
    except ValueError as error:
        return {}, [Measurement(model.name, measure, rho, None, str(error)) for measure, rho in plan]
    rows = []
    for measure, rho in plan:
        try:
            result = measure_one(candidate, measure, rho, steps, seed)
            if not math.isfinite(result.value):
                raise ValueError(f"the sharpness is {result.value}")
            rows.append(Measurement(model.name, measure, rho, result.value, "", tuple(result.warnings)))
        except ValueError as error:
            rows.append(Measurement(model.name, measure, rho, None, str(error)))
    return dict(candidate.gaps), rows


def measure_one(candidate: Candidate, measure: str, rho: float, steps: int = 20, seed: int = 0) -> SharpnessResult:
    """The sharpness of a candidate by one of ``MEASURES``."""
    given = (candidate.loss, candidate.params, candidate.batches)
    if measure == "euclidean":
        return euclidean_sharpness(*given, rho, steps, seed)
    if measure == "adaptive":
        return adaptive_sharpness(*given, rho, steps, seed)
    manifold = ParameterManifold(candidate.params, candidate.symmetry, metric=measure.removeprefix("geodesic "))
    return geodesic_sharpness(*given, manifold, rho, steps, seed=seed)


def _correlations(found: Study, plan: Sequence[tuple[str, float]], seed: int) -> Iterable[Correlation]:
    for gap in dict.fromkeys(name for gaps in found.gaps.values() for name in gaps):
        for measure, rho in plan:
            measured = found.values(measure, rho)
            values = {m: v for m, v in measured.items() if math.isfinite(found.gaps[m].get(gap, math.nan))}
            yield _correlation(measure, rho, gap, values, [found.gaps[m][gap] for m in values], seed)


def _correlation(
    measure: str, rho: float, gap: str, values: Mapping[str, float], gaps: Sequence[float], seed: int
) -> Correlation:
    try:
        result = kendall(list(values.values()), gaps, seed=seed)
    except ValueError as error:
        return Correlation(measure, rho, gap, len(values), reason=str(error))
    return Correlation(measure, rho, gap, result.n, result.tau, result.low, result.high, result.pvalue)
