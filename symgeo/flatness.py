"""How flat a minimum is, before and after the symmetry is taken out: Euclidean and covariant Hessians side by side.

The Euclidean Hessian of one function depends on which of its parameters one happens to hold; the covariant Hessian on
the quotient does not.  And where the gradient vanishes, every direction in which the symmetry moves the parameters is
an eigenvector with eigenvalue zero, so that flat directions split into those that the symmetry explains and others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symgeo.functional import Loss, Params
from symgeo.geometry import ParameterManifold
from symgeo.groups import GeneralLinear, Rotary
from symgeo.hessian import Estimate, HessianOperator, SpectralDensity, euclidean_hessian, riemannian_hessian
from symgeo.hessian.estimate import check_tol
from symgeo.hessian.matrices import second_derivative
from symgeo.progress import track
from symgeo.sharpness.result import check_count
from symgeo.sharpness.worst_case import batch_list
from symgeo.symmetry import Action, Symmetry

DENSE = 4096  # up to so many parameters all eigenvalues are computed
THRESHOLD = 1e-6
KINDS = ("euclidean", "invariant")
_POINTS = 400


@dataclass(frozen=True)
class Spectrum:
    """What is known of the eigenvalues of one Hessian.

    size : how many there are;  top : the largest, descending;  trace : their sum
    zeros : how many are within the threshold of zero, relative to the largest magnitude; None where not asked for
    density : smoothed; None where not asked for
    """

    size: int
    top: tuple[float, ...]
    trace: Estimate
    zeros: Estimate | None
    density: SpectralDensity | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "size": self.size,
            "top": list(self.top),
            "trace": _estimate(self.trace),
            "zeros": None if self.zeros is None else _estimate(self.zeros),
            "density": None if self.density is None else {
                name: [float(x) for x in getattr(self.density, name)] for name in ("grid", "density", "stderr")
            },
        }


@dataclass(frozen=True)
class FlatPoint:
    """Both Hessians at one point of an orbit."""

    name: str
    loss: float
    euclidean: Spectrum
    invariant: Spectrum


@dataclass(frozen=True)
class Flatness:
    """Hessians at the parameters given (the first point) and at random points of their orbit.

    parameters : their number;  pairs : factor pairs that the manifold quotients
    explained : the dimension of the orbit under the whole symmetry: so many eigenvalues of the Euclidean Hessian
        vanish where the gradient does
    gradient : the norm of the gradient, away from zero of which the symmetry's directions are flat but not straight
    exact : whether all eigenvalues were computed; otherwise traces and counts are estimates, with standard errors
    zeros, relaxed : parameters that are exactly zero, and pairs that lack full rank
    """

    points: tuple[FlatPoint, ...]
    metric: str
    parameters: int
    pairs: int
    explained: int
    gradient: float
    threshold: float
    exact: bool
    zeros: int = 0
    relaxed: int = 0

    @property
    def flat(self) -> Estimate:
        """How many eigenvalues of the Euclidean Hessian are near zero; see `resolved`."""
        zeros = self.points[0].euclidean.zeros
        return Estimate(0.0) if zeros is None else zeros

    @property
    def unexplained(self) -> Estimate:
        """Near-zero eigenvalues that the symmetry does not account for; negative where the gradient is not zero."""
        return self.flat.affine(1.0, -self.explained)

    def moved(self, kind: str) -> float | None:
        """The largest change of a top eigenvalue along the orbit, relative to the largest; None with one point.

        kind : "euclidean" or "invariant"; ``ValueError`` for another one
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
        start, *others = [getattr(point, kind).top for point in self.points]
        scale = max(map(abs, start)) or 1.0
        return max((abs(a - b) / scale for top in others for a, b in zip(top, start)), default=None)

    @property
    def warnings(self) -> list[str]:
        """Remarks on the numerics, in words."""
        notes = []
        if self.relaxed:
            notes.append(f"{self.relaxed} of {self.pairs} pairs lack full rank: covariant relaxation")
        if self.zeros:
            notes.append(f"{self.zeros} parameters are exactly zero, where the adaptive metric is infinite: left out "
                         "of the covariant Hessian")
        if not self.exact:
            notes.append("traces and the number of near-zero eigenvalues are estimates; their errors are those of the "
                         "random vectors and of the quadrature")
            if not resolved(self.flat):
                notes.append("the near-zero eigenvalues are not resolved from others that are small: only bounds are "
                             "known, and hold but for the random vectors")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        points = [
            {"name": p.name, "loss": p.loss, "euclidean": p.euclidean.to_dict(), "invariant": p.invariant.to_dict()}
            for p in self.points
        ]
        names = ("metric", "parameters", "pairs", "explained", "gradient", "threshold", "exact", "zeros", "relaxed")
        return {
            **{name: getattr(self, name) for name in names},
            "flat": _estimate(self.flat),
            "unexplained": _estimate(self.unexplained),
            "moved": {kind: self.moved(kind) for kind in KINDS},
            "points": points,
        }


@dataclass(frozen=True)
class _Settings:
    top: int
    threshold: float
    samples: int
    seed: int
    exact: bool
    tol: float | None


def measure_flatness(
    loss: Loss, params: Params, batches: Iterable[Any], symmetry: Symmetry, metric: str = "inv", top: int = 5,
    orbits: int = 1, threshold: float = THRESHOLD, samples: int = 8, density: bool = False, seed: int = 0,
    progress: bool = False, tol: float | None = None,
) -> Flatness:
    """Top eigenvalues, trace and near-zero eigenvalues of the Euclidean and of the covariant Hessian.

    The covariant one is :func:`symgeo.hessian.riemannian_hessian` on ``ParameterManifold(params, symmetry, metric)``.
    ``orbits`` random elements of the groups that this manifold quotients move the parameters, and everything is
    measured again.  An eigenvalue is near zero when its magnitude is at most ``threshold`` times the largest.

    Up to 4096 parameters all eigenvalues are computed.  Above, the top ones come from block Krylov iterations, traces
    from ``samples`` random vectors, and the number of near-zero ones from as many Lanczos runs of up to 512 steps;
    where that does not resolve it, `resolved` is False of it, and only its bounds are to be used.

    density : keep smoothed densities of all spectra
    tol : of traces, densities and the number of near-zero eigenvalues, relative; ``samples`` is then the most

    Raises ``ValueError`` for ``top`` outside 1..size of the smaller Hessian, ``orbits`` < 0, a threshold outside
    (0, 1), and as :func:`symgeo.hessian.euclidean_hessian` does; ``SymmetryError`` where the loss is not invariant.

    >>> from symgeo.groups import GeneralLinear
    >>> net = {"u": torch.tensor([1.0], dtype=torch.float64), "v": torch.tensor([2.0], dtype=torch.float64)}
    >>> gauge = Symmetry({"u": "(h e)", "v": "(h e*)"}, {"e": GeneralLinear(per="h")}, sizes={"e": 1})
    >>> loss = lambda params, batch: (params["u"] * params["v"] - batch).square().sum()
    >>> found = measure_flatness(loss, net, [2.0], gauge, top=1)      # a minimum
    >>> [round(x, 9) for x in (*found.points[0].euclidean.top, *found.points[0].invariant.top)]
    [10.0, 16.0]
    >>> int(found.flat), found.explained, found.moved("invariant") < 1e-12 < 1e-3 < found.moved("euclidean")
    (1, 1, True)
    """
    data = batch_list(batches)
    params = {name: p.detach() for name, p in params.items()}
    manifold = ParameterManifold(params, symmetry, metric)
    chart = manifold.chart(params)
    parameters = sum(p.numel() for p in params.values())
    settings = _Settings(check_count("top", top), _fraction(threshold), check_count("samples", samples), seed,
                         parameters <= DENSE, check_tol(tol))
    places = {"as given": params} | orbit_points(symmetry.bind(params), params, orbits, seed)
    points: list[FlatPoint] = []
    for name in track(list(places), "Hessians", progress):
        place = places[name]
        operators = (euclidean_hessian(loss, place, data), riemannian_hessian(loss, place, data, manifold))
        _check_top(top, operators[1])
        first = not points
        spectra = [_spectrum(op, settings, density, density or (first and i == 0)) for i, op in enumerate(operators)]
        with torch.no_grad():
            value = math.fsum(float(loss(place, batch)) for batch in data) / len(data)
        points.append(FlatPoint(name, value, *spectra))
    gradient = float(second_derivative(loss, params, data)[1].gradient().norm())
    return Flatness(tuple(points), metric, parameters, chart.pairs, symmetry.dimension(params), gradient,
                    settings.threshold, settings.exact, chart.zeros, chart.relaxed)


def orbit_points(action: Action, params: Params, count: int, seed: int = 0) -> dict[str, Params]:
    """The parameters moved by random elements of the GL and rotary groups; none where there are no such groups.

    Raises ``ValueError`` for a negative count.
    """
    if int(count) != count or count < 0:
        raise ValueError(f"orbits must be an integer >= 0; got {count}")
    names = [n for n, group in action.groups.items() if isinstance(group, (GeneralLinear, Rotary)) and action.blocks(n)]
    if not names:
        return {}
    draws = (torch.Generator().manual_seed(seed + i) for i in range(count))
    return {f"orbit {i + 1}": action.act(action.random(draw, names), params) for i, draw in enumerate(draws)}


def _fraction(threshold: float) -> float:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1; got {threshold}")
    return float(threshold)


def _check_top(top: int, smaller: HessianOperator) -> None:
    if top > smaller.shape[0]:
        raise ValueError(f"top must be at most {smaller.shape[0]}, the size of the covariant Hessian; got {top}")


def _spectrum(operator: HessianOperator, settings: _Settings, keep: bool, count: bool) -> Spectrum:
    """Everything from all eigenvalues where that is affordable, else from products."""
    size, samples, seed, tol = operator.shape[0], settings.samples, settings.seed, settings.tol
    if settings.exact:
        values = operator.eigvalsh().double()
        zeros = Estimate(float((values.abs() <= settings.threshold * values.abs().max()).sum()), products=size)
        trace = Estimate(float(values.sum()), products=size)
        density = exact_density(values) if keep else None
        return Spectrum(size, _descending(values[-settings.top:]), trace, zeros, density)
    top = operator.eigvalsh(settings.top, seed=seed)
    return Spectrum(size, _descending(top), operator.trace(samples, seed, tol=tol),
                    operator.near_zero(settings.threshold, samples, seed, tol=tol) if keep or count else None,
                    operator.spectral_density(samples, points=_POINTS, seed=seed, tol=tol) if keep else None)


def resolved(count: Estimate) -> bool:
    """Whether a number of near-zero eigenvalues is one, exact or with an error, or only its bounds are known."""
    return count.bounds is None or count.converged is not False


def exact_density(values: Tensor, points: int = _POINTS) -> SpectralDensity:
    """The smoothed density of known eigenvalues ``(d,)``, in the form and width of an estimated one."""
    low, high = float(values.min()), float(values.max())
    width = max(high - low, 1e-6 * max(abs(low), abs(high)), torch.finfo(torch.float64).tiny) / 100
    grid = torch.linspace(low - 5 * width, high + 5 * width, points, dtype=torch.float64, device=values.device)
    bumps = ((grid.unsqueeze(1) - values) / width).square().mul(-0.5).exp()
    smooth = bumps.mean(1) / (width * math.sqrt(2 * math.pi))
    weights = torch.full_like(values, 1 / values.numel()).unsqueeze(0)
    return SpectralDensity(grid, smooth, torch.zeros_like(smooth), width, values.unsqueeze(0), weights)


def _descending(values: Tensor) -> tuple[float, ...]:
    return tuple(float(x) for x in reversed(values.tolist()))


def _estimate(value: Estimate) -> dict[str, Any]:
    """Without a value where there are bounds and the quadrature has not brought them together."""
    number = {"value": value.value if resolved(value) else None, "stderr": value.stderr, "samples": value.samples,
              "products": value.products, "converged": value.converged}
    return number if value.bounds is None else {**number, "bounds": list(value.bounds)}
