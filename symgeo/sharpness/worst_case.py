"""Worst-case sharpness: the largest increase of the loss in a ball of the metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from manifolds.geodesic import METHODS
from symgeo.chart import Chart
from symgeo.errors import SymmetryError
from symgeo.functional import Loss, Params, recomputable
from symgeo.geometry import ParameterManifold
from symgeo.progress import track
from symgeo.sharpness.ascent import Ascent, Objective, auto_pgd
from symgeo.sharpness.result import SharpnessResult, check_count, check_rho

INVARIANCE = {torch.float64: 1e-4, torch.float32: 2e-2}  # of the loss, when the gauge is balanced


def geodesic_sharpness(
    loss: Loss, params: Params, batches: Iterable[Any], manifold: ParameterManifold, rho: float, steps: int = 20,
    geodesic: str = "exact", seed: int = 0, keep: bool = False, progress: bool = False,
) -> SharpnessResult:
    r"""The largest increase of the loss along geodesics of length at most ``rho``, per batch, averaged.

        S = mean_B  max_{|xi|_w <= rho, xi horizontal}  L_B(exp_w(xi)) - L_B(w)

    (Hide & Seek, arXiv 2505.05409, Eq. 9, with the exact exponential map; "taylor2" is the paper's second-order
    curve, "linear" the straight line).  Found by Auto-PGD in metric-orthonormal coordinates of the balanced
    gauge, ``steps`` forward and backward passes per batch after the first; the returned perturbation attains
    the returned value, so ``S`` is a lower bound of the maximum.  ``S`` is invariant under every group that
    the manifold quotients, to rounding.

    At a critical point the search starts at random from ``seed``.  With ``keep`` the perturbations are returned,
    as tangent vectors at ``params`` in the gauge they were given in.  Under ``torch.autocast`` only the loss
    runs in low precision.

    Raises ``ValueError`` for rho < 0 or NaN, no batches, a loss that is not a finite scalar, parameters that
    are not those of the manifold; ``SymmetryError`` when the loss is not invariant under the declared groups.

    >>> loss = lambda params, batch: (params["u"] * params["v"] - batch).square().sum()
    >>> net = {"u": torch.tensor([1.0], dtype=torch.float64), "v": torch.tensor([2.0], dtype=torch.float64)}
    >>> from symgeo import Symmetry, groups
    >>> gauge = Symmetry({"u": "(h e)", "v": "(h e*)"}, {"e": groups.GeneralLinear(per="h")}, sizes={"e": 1})
    >>> manifold = ParameterManifold(net, gauge, metric="mix")
    >>> result = geodesic_sharpness(loss, net, [1.0], manifold, rho=0.1)
    >>> round(result.value, 9) == round(2 * 2**0.5 * 0.1 * abs(2 - 1) + 2 * 0.1**2, 9)
    True
    """
    if not isinstance(manifold, ParameterManifold):
        raise ValueError(f"manifold must be a symgeo.ParameterManifold; got {type(manifold).__name__}")
    if geodesic not in METHODS:
        raise ValueError(f"geodesic must be one of {', '.join(METHODS)}; got {geodesic!r}")
    kind = f"geodesic {manifold.metric}"
    return _measure(loss, params, batches, manifold, rho, steps, geodesic, seed, keep, progress, kind)


def adaptive_sharpness(
    loss: Loss, params: Params, batches: Iterable[Any], rho: float, steps: int = 20,
    seed: int = 0, keep: bool = False, progress: bool = False,
) -> SharpnessResult:
    r"""Elementwise adaptive sharpness: ``mean_B max_{|xi / w| <= rho} L_B(w + xi) - L_B(w)``.

    Kwon et al.'s ASAM measure with the search of :func:`geodesic_sharpness` on straight lines.  Invariant under
    positive rescaling of hidden units, not under GL(h).  Parameters that are exactly zero do not move.
    """
    manifold = ParameterManifold(params, rest="adaptive")
    return _measure(loss, params, batches, manifold, rho, steps, "linear", seed, keep, progress, "adaptive")


def euclidean_sharpness(
    loss: Loss, params: Params, batches: Iterable[Any], rho: float, steps: int = 20,
    seed: int = 0, keep: bool = False, progress: bool = False,
) -> SharpnessResult:
    r"""Worst-case sharpness in the Euclidean ball: ``mean_B max_{|xi| <= rho} L_B(w + xi) - L_B(w)``."""
    manifold = ParameterManifold(params, rest="euclidean")
    return _measure(loss, params, batches, manifold, rho, steps, "linear", seed, keep, progress, "euclidean")


def _measure(
    loss: Loss, params: Params, batches: Iterable[Any], manifold: ParameterManifold, rho: float, steps: int,
    geodesic: str, seed: int, keep: bool, progress: bool, kind: str,
) -> SharpnessResult:
    rho, steps = check_rho(rho), check_count("steps", steps)
    data = batch_list(batches)
    params = {name: tensor.detach() for name, tensor in params.items()}
    chart = manifold.chart(params)
    generator = torch.Generator().manual_seed(seed)
    ascents = []
    for batch in track(data, f"{kind} sharpness", progress):
        check_invariance(loss, params, chart, batch)
        objective = _objective(loss, chart, batch, geodesic, rho)
        if rho == 0:
            value, _ = objective(chart.origin())
            ascents.append(Ascent(chart.origin(), value, [value], 0))
        else:
            ascents.append(auto_pgd(objective, chart.origin(), rho, steps, lambda: chart.random(generator)))
    return summarise(ascents, chart, rho, kind, geodesic, steps, chart.tangent if keep else None)


def _objective(loss: Loss, chart: Chart, batch: Any, geodesic: str, rho: float) -> Objective:
    """Value and horizontal gradient of ``z -> L_B(exp(z))``: one forward and one backward pass."""

    def objective(z: Tensor) -> tuple[float, Tensor]:
        z = z.detach().requires_grad_()
        with torch.enable_grad(), recomputable():
            value = evaluate(loss, chart.point(z, geodesic, bound=rho), batch)
            (gradient,) = torch.autograd.grad(value, z)
        return float(value.detach()), chart.project(gradient)

    return objective


def evaluate(loss: Loss, params: Params, batch: Any) -> Tensor:
    """``loss(params, batch)``, checked to be a scalar tensor."""
    value = loss(params, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss(params, batch) must return a scalar tensor; got {found}. Reduce it, e.g. with .mean()")
    return value.reshape(())


class Measured(Protocol):
    """What a measurement says of the coordinates that it was made in."""

    pairs: int
    relaxed: int
    zeros: int
    dtype: torch.dtype
    device: torch.device


def check_base(loss: float) -> float:
    """The loss at the parameters, or ``ValueError`` if it is not finite."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss at the parameters is {loss}: needed a finite number; check data and weights")
    return loss


def check_invariance(loss: Loss, params: Params, chart: Chart, batch: Any) -> None:
    """Raises where the loss is not finite, or changes when only the gauge does."""
    with torch.no_grad():
        given = check_base(float(evaluate(loss, params, batch)))
        if not chart.pairs:
            return
        balanced = float(evaluate(loss, chart.point(chart.origin(), "linear"), batch))
    check_gauges(given, balanced, chart)


def check_gauges(given: float, balanced: float, chart: Measured) -> None:
    """Raises where a loss changes when only the gauge does."""
    tolerance = 0.1 if torch.is_autocast_enabled(chart.device.type) else INVARIANCE.get(chart.dtype, 2e-2)
    if not abs(balanced - given) <= tolerance * (abs(given) + tolerance):
        raise SymmetryError(
            f"the loss is not invariant under the declared symmetry: {given:.6g} at the parameters, {balanced:.6g} at "
            "an equivalent point. Run symgeo.check on the declaration; if the model has dropout, call model.eval()"
        )


def batch_list(batches: Iterable[Any]) -> Sequence[Any]:
    """The batches as a list; an empty one is an error."""
    try:
        data = list(batches)
    except TypeError:
        raise ValueError(f"batches must be an iterable of batches; got {type(batches).__name__}") from None
    if not data:
        raise ValueError("batches: needed at least one batch; found none")
    return data


def summarise(ascents: Sequence[Ascent], chart: Measured, rho: float, kind: str, geodesic: str, steps: int,
              tangent: Callable[[Tensor], Params] | None = None) -> SharpnessResult:
    """The mean over batches, with everything that was noticed on the way; perturbations if there is a ``tangent``."""
    base = [ascent.history[0] for ascent in ascents]
    increases = [ascent.value - ascent.history[0] for ascent in ascents]
    return SharpnessResult(
        value=math.fsum(increases) / len(increases), per_batch=increases, base_losses=base, rho=rho, kind=kind,
        geodesic=geodesic, steps=steps, pairs=chart.pairs, relaxed=chart.relaxed, zeros=chart.zeros,
        left_domain=sum(ascent.rejected for ascent in ascents),
        resolution=4 * torch.finfo(chart.dtype).eps * max(abs(value) for value in base),
        history=[ascent.history for ascent in ascents],
        perturbations=None if tangent is None else [tangent(ascent.point) for ascent in ascents],
    )
