"""Average-case sharpness: the mean increase of the loss under random perturbations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from symgeo.functional import Loss, Params
from symgeo.geometry import ParameterManifold
from symgeo.sharpness.ascent import Ascent
from symgeo.sharpness.result import SharpnessResult, check_count, check_rho
from symgeo.sharpness.worst_case import batch_list, check_invariance, evaluate, summarise


def average_sharpness(
    loss: Loss, params: Params, batches: Iterable[Any], rho: float, manifold: ParameterManifold | None = None,
    samples: int = 20, seed: int = 0,
) -> SharpnessResult:
    r"""``mean_B E_z [L_B(exp_w(rho z)) - L_B(w)]`` with Gaussian ``z``.

    Distribution: ``z`` is standard normal in metric-orthonormal coordinates of the horizontal space at ``w`` (in
    the balanced gauge, so that the distribution is invariant); its expected squared length is the dimension of
    that space.  Without a manifold the metric is Euclidean: ``w + N(0, rho^2 I)``.  The same ``samples``
    perturbations are used for every batch; ``seed`` decides them.  ``.standard_error`` is that of the mean over
    the perturbations.

    Raises ``ValueError`` as :func:`symgeo.geodesic_sharpness` does, and where a perturbed loss is not finite.
    """
    rho, samples = check_rho(rho), check_count("samples", samples)
    data = batch_list(batches)
    params = {name: tensor.detach() for name, tensor in params.items()}
    chart = (manifold or ParameterManifold(params, rest="euclidean")).chart(params)
    generator = torch.Generator().manual_seed(seed)
    totals, base = [[0.0] * samples for _ in data], []
    with torch.no_grad():
        for batch in data:
            check_invariance(loss, params, chart, batch)
            base.append(float(evaluate(loss, chart.point(chart.origin()), batch)))
        for k in range(samples):
            point = chart.point(rho * chart.random(generator))
            for b, batch in enumerate(data):
                totals[b][k] = float(evaluate(loss, point, batch)) - base[b]
                if not math.isfinite(totals[b][k]):
                    raise ValueError(f"a perturbed loss is not finite at rho = {rho:g}; take a smaller rho")
    ascents = [Ascent(chart.origin(), value + math.fsum(row) / samples, [value], 0) for value, row in zip(base, totals)]
    means = [math.fsum(column) / len(data) for column in zip(*totals)]
    error = torch.tensor(means, dtype=torch.float64).std().item() / math.sqrt(samples) if samples > 1 else None
    kind = f"average {manifold.metric if chart.pairs and manifold else manifold.rest if manifold else 'euclidean'}"
    result = summarise(ascents, chart, rho, kind, "exact", samples)
    return SharpnessResult(**{**result.__dict__, "standard_error": error})
