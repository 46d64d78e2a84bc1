"""Log-determinants, spectral densities and counts of near-zero eigenvalues by stochastic Lanczos quadrature.

Each is the mean over random probes of ``v^T f(S) v`` (Ubaru, Chen, Saad 2017).  It has two errors: that of the probes,
and that of the quadrature, which is exact only for polynomials; both are in the standard errors here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symgeo.hessian.estimate import Estimate, check_tol, student
from symgeo.hessian.lanczos import Jacobi, Quadrature, Recurrence, SpectralDensity
from symgeo.hessian.traces import signs
from symgeo.sharpness.result import check_count

#: from the rules of some probes to draws of the result and half widths of the quadrature's error, ``(probes, ...)``
Measure = Callable[[Jacobi], tuple[Tensor, Tensor]]
MOST = 512  # steps of a probe where none are given
_TOGETHER = 8  # probes at once
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Plan:
    """How much to draw.

    samples : probes, the most of them where there is a tolerance;  steps : of each probe, None for as many as it takes
    tol : of the error relative to the size of the result;  first : steps to begin with where None are given
    slack : an error of the quadrature that is of no account
    """

    samples: int
    steps: int | None
    tol: float | None
    seed: int
    first: int = 32
    slack: float = 0.0

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        check_tol(self.tol)
        if self.steps is not None:
            check_count("steps", self.steps)


@dataclass(frozen=True)
class Sampled:
    """Draws and half widths, ``(probes, ...)``, and what they came from: means, errors, and the sums of their sizes."""

    draws: Tensor
    half: Tensor
    rules: list[Jacobi]
    products: int

    @property
    def mean(self) -> Tensor:
        """The result ``(...)``."""
        return self.draws.mean(0)

    @property
    def stat(self) -> Tensor:
        """Its standard error over the probes."""
        count = len(self.draws)
        if count == 1:
            return torch.full_like(self.draws[0], torch.inf)
        return torch.nan_to_num(self.draws.std(0), nan=0.0) * (student(count) / math.sqrt(count))  # nan: all infinite

    @property
    def quad(self) -> Tensor:
        """The error of the quadrature."""
        return self.half.mean(0).abs()

    def sizes(self) -> tuple[float, float, float]:
        """Of the result and of the two errors."""
        return float(self.mean.abs().sum()), float(self.stat.sum()), float(self.quad.sum())

    def converged(self, plan: Plan) -> bool | None:
        """Whether within the tolerance; without one, False where the quadrature is what limits."""
        size, stat, quad = self.sizes()
        if not stat + quad:
            return True
        if plan.tol is not None:
            return stat + quad <= max(plan.tol * size, plan.slack)
        return None if quad <= max(stat, plan.slack) else False

    def estimate(self, plan: Plan) -> Estimate:
        """Of a number."""
        mean, stat, quad = float(self.mean), float(self.stat), float(self.quad)
        reach = quad + 3 * stat
        ends = (mean - reach, mean + reach) if math.isfinite(mean) else (mean, mean)
        return Estimate(mean, stat + quad, len(self.draws), self.products, self.converged(plan), ends)


def sample(operator: Any, measure: Measure, plan: Plan) -> Sampled:
    """Probes until the plan is met: the first few go as deep as their quadrature needs, the others as deep as they.

    Deep enough is an error of the quadrature within half the tolerance, or, without one, within a quarter of the error
    that the probes will have.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    together = min(_TOGETHER, plan.samples)
    run = Recurrence(operator, signs(operator, together, generator))
    steps, most = plan.steps or min(plan.first, MOST), plan.steps or MOST
    while True:
        run.extend(steps)
        rules = run.jacobi
        found = Sampled(*measure(rules), [rules], together * rules.steps)
        size, stat, quad = found.sizes()
        goal = 0.5 * plan.tol * size if plan.tol else 0.25 * stat * math.sqrt(together / plan.samples)
        if steps >= min(most, len(run.q)) or quad <= max(plan.slack, goal):
            break
        steps = min(2 * steps, most)
    del run
    while len(found.draws) < plan.samples and not (plan.tol and found.converged(plan)):
        more = Recurrence(operator, signs(operator, min(together, plan.samples - len(found.draws)), generator))
        more.extend(steps)
        draws, half = measure(more.jacobi)
        products = found.products + len(draws) * more.jacobi.steps
        found = Sampled(torch.cat([found.draws, draws]), torch.cat([found.half, half]),
                        [*found.rules, more.jacobi], products)
    return found


def log_volume(operator: Any, damping: float, plan: Plan, check: Callable[[Tensor], object] | None = None) -> Estimate:
    """``log |det(S + damping I)|``.

    Where no node is negative the rule of Gauss is an upper bound, and the one with a further node at the rounding
    level, below which a matrix is singular, a lower bound (Golub, Meurant 1994): the result is their mean, and the
    error covers both.  Otherwise the error is the larger of their difference and of that from half the steps.

    check : called with the nodes, to raise for those that must not be
    """
    size, eps = operator.shape[0], torch.finfo(operator.dtype).eps

    def logs(rule: Quadrature, floor: float) -> Tensor:
        return size * (rule.weights * (rule.nodes + damping).abs().clamp(min=floor).log()).sum(-1)

    def measure(rules: Jacobi) -> tuple[Tensor, Tensor]:
        ritz = rules.eigh()
        gauss = Quadrature(ritz[0], ritz[1][:, 0].square())
        shifted, used = gauss.nodes + damping, gauss.weights > _EPS
        floor = size * eps * float(shifted[used].abs().max())
        if check is not None:
            check(shifted[used])
        if not floor or bool((used & (shifted.abs() <= floor)).any()):
            return torch.full_like(shifted[:, 0], -torch.inf), torch.zeros_like(shifted[:, 0])
        upper, lower = logs(gauss, floor), logs(rules.radau(floor - damping, ritz), floor)
        gap, positive = (upper - lower).abs(), (shifted.where(used, 1.0) > 0).all(-1)
        half = _unless_exact(rules, lambda part: upper - logs(part.gauss(), floor)).abs().maximum(gap)
        return torch.where(positive, 0.5 * (upper + lower), upper), torch.where(positive, 0.5 * gap, half)

    return sample(operator, measure, plan).estimate(plan)


def density(operator: Any, points: int, width: float | None, plan: Plan) -> SpectralDensity:
    """The smoothed spectral density; the default width is a hundredth of the range of the nodes.

    The quadrature's error is the difference from that of half the steps, at its largest within the distance of nodes.
    """
    check_count("points", points)
    if width is not None and not width > 0:
        raise ValueError(f"width must be positive; got {width}")
    grids: dict[int, tuple[Tensor, float]] = {}  # of the first probes, for all

    def smooth(rule: Quadrature, grid: Tensor, width: float) -> Tensor:
        step = float(grid[-1] - grid[0]) / max(points - 1, 1)
        bumps = ((grid[:, None] - rule.nodes[:, None]) / width).square().mul(-0.5).exp()  # (probes, points, nodes)
        return step * (bumps @ rule.weights.unsqueeze(-1)).squeeze(-1) / (width * math.sqrt(2 * math.pi))

    def measure(rules: Jacobi) -> tuple[Tensor, Tensor]:
        rule = rules.gauss()
        if rules.steps not in grids:
            grids[rules.steps] = _grid(rule.nodes[rule.weights > _EPS], points, width)
        draws = smooth(rule, *grids[rules.steps])
        gap = _unless_exact(rules, lambda part: draws - smooth(part.gauss(), *grids[rules.steps]))
        near = -(-points // rules.steps)
        reach = torch.nn.functional.max_pool1d(gap.mean(0).abs()[None], 2 * near + 1, stride=1, padding=near)
        return draws, reach.expand_as(draws)

    found = sample(operator, measure, plan)
    grid, chosen = grids[found.rules[0].steps]
    step = float(grid[-1] - grid[0]) / max(points - 1, 1) or 1.0
    rules = [rule.gauss() for rule in found.rules]
    nodes, weights = (torch.cat([getattr(rule, name) for rule in rules]) for name in ("nodes", "weights"))
    return SpectralDensity(grid, found.mean / step, (found.stat + found.quad) / step, chosen, nodes, weights,
                           found.products, found.converged(plan))


def _grid(values: Tensor, points: int, width: float | None) -> tuple[Tensor, float]:
    """A grid that covers the values and the tails of the smoothing, and the width of that."""
    low, high = (float(end) for end in torch.aminmax(values))
    if width is None:
        width = max(high - low, 1e-6 * max(abs(low), abs(high)), torch.finfo(torch.float64).tiny) / 100
    return torch.linspace(low - 5 * width, high + 5 * width, points, dtype=torch.float64, device=values.device), width


def _unless_exact(rules: Jacobi, difference: Callable[[Jacobi], Tensor]) -> Tensor:
    """The difference from half the steps; 0 for probes whose rule is exact, infinite where there are no half steps."""
    gap = difference(rules.cut(max(rules.steps // 2, 1)))
    exact = (rules.betas[:, -1] == 0).reshape(-1, *[1] * (gap.ndim - 1))
    return torch.where(exact, 0.0, gap if rules.steps > 1 else torch.inf)


def near_zero(operator: Any, threshold: float, plan: Plan) -> Estimate:
    """How many eigenvalues have a magnitude up to ``threshold`` times the largest.

    A probe's mass up to there is only bounded by the quadrature.  From above, and from below, by the rules with a
    further node at either end of the interval, which attain what the moments allow.  From below also by the Ritz
    vectors with small values and residuals: where ``u`` is the part of the probe ``v`` along them and ``P`` projects on
    the near-zero eigenvectors, ``|P v| >= |u| - |S u| / (|u| bound)``.  The result is the middle of the bounds;
    ``converged`` is False, and only ``bounds`` are to be relied on, where they are further apart than the probes'
    error.
    """
    size = operator.shape[0]

    def measure(rules: Jacobi) -> tuple[Tensor, Tensor]:
        ritz = rules.eigh()
        nodes, first = ritz[0], ritz[1][:, 0]
        bound = threshold * float(nodes[first.square() > _EPS].abs().max())
        inside = (first.square() * (nodes.abs() <= bound)).sum(-1)
        (below, upto), (short, past) = (_mass(rules.radau(end, ritz), end) for end in (-bound, bound))
        low = torch.maximum(_along_ritz(nodes, first, rules.betas[:, -1:] * ritz[1][:, -1], bound), short - upto)
        exact = rules.betas[:, -1] == 0
        high = torch.where(exact, inside, (past - below).clamp(0.0, 1.0))
        low = torch.where(exact, inside, low.clamp(min=0.0)).minimum(high)
        return 0.5 * size * (high + low), 0.5 * size * (high - low)

    found = sample(operator, measure, plan).estimate(plan)
    low, high = found.bounds or (0.0, float(size))
    return Estimate(found, found.stderr, found.samples, found.products, found.converged,
                    (max(low, 0.0), min(high, float(size))))


def _mass(rule: Quadrature, node: float) -> tuple[Tensor, Tensor]:
    """The weight below the node nearest to ``node``, and up to it."""
    place = (rule.nodes - node).abs().argmin(-1, keepdim=True)
    total = rule.weights.cumsum(-1).gather(-1, place).squeeze(-1)
    return total - rule.weights.gather(-1, place).squeeze(-1), total


def _along_ritz(nodes: Tensor, first: Tensor, residuals: Tensor, bound: float) -> Tensor:
    """The best lower bound on the mass within ``bound`` from the Ritz vectors with the smallest images."""
    image = nodes.square() + residuals.square()
    order = image.argsort(-1)
    part, value, rest = (x.gather(-1, order) for x in (first, nodes, residuals))
    mass = part.square().cumsum(-1)
    moved = (part * value).square().cumsum(-1) + (part * rest).cumsum(-1).square()
    tiny = torch.finfo(mass.dtype).tiny
    leak = (moved / mass.clamp(min=tiny)).sqrt() / max(bound, tiny)
    return (mass.sqrt() - leak).clamp(min=0.0).square().amax(-1)
