"""The Fréchet mean of whole models on the quotient by a symmetry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from manifolds import frechet_mean
from symgeo.functional import Params
from symgeo.geometry import ParameterManifold
from symgeo.merge.align_gauge import Gauge
from symgeo.merge.align_search import Search, refine, squared_distance
from symgeo.merge.align_steps import Step
from symgeo.merge.align_stream import common_gauges
from symgeo.merge.alignment import Aligner
from symgeo.pairs import Instance
from symgeo.symmetry import Element, Symmetry

METRICS = ("bures", "inv", "mix")
_STILL = 1e-18  # of the squared movement of the mean in one round, relative to its squared length


@dataclass(frozen=True)
class ModelMean:
    """What :func:`quotient_mean` returns.

    params : the mean, in the gauge of the reference;  history : the objective ``sum_i w_i |k_i x_i - m|^2`` after
    every round of alignments;  converged : whether the last round, and the mean of every pair, changed nothing;
    deficient : groups with pairs that have no balanced gauge.
    """

    params: Params
    history: tuple[float, ...]
    converged: bool
    deficient: tuple[str, ...]

    @property
    def iterations(self) -> int:
        """The number of rounds of alignments after the first."""
        return len(self.history) - 1


@torch.no_grad()
def quotient_mean(
    models: Sequence[Params],
    weights: Sequence[float],
    symmetry: Symmetry,
    reference: int = 0,
    metric: str = "bures",
    aligner: Aligner | None = None,
    max_iter: int = 1000,
) -> ModelMean:
    """The mean of :func:`symgeo.merge.merge_models` with its report; models and weights are checked there.

    Generalised Procrustes analysis: with the models ``x_i`` in their balanced gauges, alignments ``k_i`` to the mean
    and means of the aligned models alternate, which never increases ``sum_i w_i |k_i x_i - m|^2``.
    """
    aligner = aligner or Aligner(symmetry.bind(models[reference]))
    action = aligner.action
    kept = [i for i, w in enumerate(weights) if w > 0]
    gauges = common_gauges(action, {i: models[i] for i in dict.fromkeys([*kept, reference])}, reference)
    home = gauges[reference]
    found = {i: aligner.search(models[i], gauges[i].params, models[reference], home.params) for i in kept}
    if reference in found:  # it is in place: only its steps are of use
        found[reference] = (Search(home.params, Element({})), found[reference][1])
    shares = [weights[i] for i in kept]
    states, mean, history, converged = _procrustes(aligner, list(found.values()), shares, max_iter)
    if metric != "bures":
        _check_full_rank(metric, {i: gauges[i] for i in kept})
        mean, settled = _pair_means([state.params for state in states], shares, mean, symmetry, metric)
        converged = converged and settled
    back = action.act(action.inverse(home.element), mean)
    params = {name: back[name].to(p.dtype) for name, p in models[reference].items()}
    deficient = tuple(dict.fromkeys(name for gauge in gauges.values() for name in gauge.deficient))
    return ModelMean(params, tuple(history), converged and all(g.converged for g in gauges.values()), deficient)


def _procrustes(
    aligner: Aligner, found: Sequence[tuple[Search, list[Step]]], weights: Sequence[float], max_iter: int
) -> tuple[list[Search], Params, list[float], bool]:
    """Aligned models, their mean, the objectives, and whether the last round changed nothing."""
    states = [state for state, _ in found]
    mean = weighted_mean([state.params for state in states], weights)
    history = [_spread(states, weights, mean)]
    for _ in range(max_iter):
        states = [
            refine(aligner.action, state, steps, mean, max_sweeps=1)
            for state, (_, steps) in zip(states, found)
        ]
        before, mean = mean, weighted_mean([state.params for state in states], weights)
        history.append(_spread(states, weights, mean))
        if squared_distance(mean, before) <= _STILL * sum(float(x.square().sum()) for x in mean.values()):
            return states, mean, history, True
    return states, mean, history, False


def weighted_mean(models: Sequence[Params], weights: Sequence[float]) -> Params:
    """``sum_i w_i th_i`` for weights with sum 1, in double precision."""
    return {name: sum((w * m[name].double() for w, m in zip(weights, models)), torch.zeros(())) for name in models[0]}


def _spread(states: Sequence[Search], weights: Sequence[float], mean: Params) -> float:
    return sum(w * squared_distance(state.params, mean) for w, state in zip(weights, states))


def _check_full_rank(metric: str, gauges: dict[int, Gauge]) -> None:
    for i, gauge in gauges.items():
        if gauge.deficient:
            raise ValueError(
                f"models[{i}]: a pair of group {gauge.deficient[0]!r} does not have full rank, which the metric"
                f" {metric!r} needs; take metric='bures'"
            )


def _pair_means(
    aligned: Sequence[Params], weights: Sequence[float], start: Params, symmetry: Symmetry, metric: str
) -> tuple[Params, bool]:
    """The aligned models with every factor pair replaced by its mean in the metric, the rest by its plain mean."""
    manifold = ParameterManifold(start, symmetry, metric, rest="euclidean")
    packed, result, converged = [manifold.pack(p) for p in aligned], manifold.pack(start), True
    for name, pair in manifold.pairs.items():
        bucket = manifold.layout.buckets[name]
        found = frechet_mean(pair, [p[name] for p in packed], weights, start=result[name])
        lost = torch.isinf(found.per_problem.spread).nonzero()
        if len(lost):
            raise ValueError(
                f"{_label(bucket, int(lost[0]))}: no geodesic from the mean to one of the models, which are too far"
                f" apart for the metric {metric!r}; take metric='bures'"
            )
        result[name], converged = found.point, converged and found.converged
    return manifold.unpack(result, start), converged


def _label(instances: Sequence[Instance], position: int) -> str:
    """The name of the pair at a position of a bucket."""
    for instance in instances:
        if position < instance.batch:
            break
        position -= instance.batch
    first, second = instance.primal[0].parameter, instance.dual[0].parameter
    return f"pair {position} of {first!r} with {second!r}"
