"""Merging whole models: plain, Fisher-weighted, and Fréchet means on the quotient by a symmetry.

- "mean": ``sum_i w_i th_i``.
- "fisher": ``(sum_i w_i F_i)^-1 sum_i w_i F_i th_i`` with diagonal Fishers ``F_i``, the minimum of
  ``sum_i w_i (th - th_i)^T F_i (th - th_i)``: the Fréchet mean with each metric frozen at its model.  The plain mean
  where all Fishers are zero.
- "frechet": the minimum of ``sum_i w_i d(th, th_i)^2``, with d the distance on the quotient by the symmetry.  Every
  model is carried into its balanced gauge, where only the compact elements k are left, and

      m = argmin_m sum_i w_i min_k |k x_i - m|^2      (x_i: the balanced models)

  is found by alternating alignments and means.  On a GL, rotary or LoRA pair this is the Bures-Wasserstein mean of the
  balanced factors.  The metrics "inv" and "mix" replace it there by the mean along true geodesics
  (:class:`manifolds.FactorPair`); the other parameters keep the plain mean in the aligned gauge.

That a merge should be a Fréchet mean in an invariant geometry, and contains Fisher merging, is said in arXiv
2604.27155; the algorithm was derived here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from symgeo.functional import Params
from symgeo.merge.align_checks import check_same, normalised
from symgeo.merge.alignment import Aligner
from symgeo.merge.model_mean import METRICS, quotient_mean, weighted_mean
from symgeo.symmetry import Symmetry

METHODS = ("frechet", "mean", "fisher")


def merge_models(
    models: Sequence[Params],
    weights: Sequence[float] | Tensor | None = None,
    symmetry: Symmetry | None = None,
    method: str = "frechet",
    reference: int = 0,
    fishers: Sequence[Params] | None = None,
    *,
    metric: str = "bures",
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    restarts: int = 0,
    seed: int = 0,
) -> Params:
    """One model out of several with the same parameters; ``weights`` (default: equal) are divided by their sum.

    ``method`` is "mean" or "fisher", which take the parameters as they are, whatever the symmetry, or "frechet", the
    mean on the quotient by ``symmetry`` in the ``metric`` "bures", "inv" or "mix" of its factor pairs (see
    :mod:`symgeo.merge.models` for their definitions); without a symmetry that is the plain mean.

    A "frechet" merge is returned in the gauge of the model ``reference``, from which the alignments start.  It
    computes the same function when any model, the reference included, is replaced by another one of its orbit; of
    models in one orbit it is the reference.  The order of the models and the reference matter only where the search
    ends in another local optimum.  Parameters that are frozen, or that the symmetry does not name, are averaged
    plainly.  ``model`` and ``batches`` (units matched by activations), ``restarts`` and ``seed`` are those of
    :func:`symgeo.merge.align`.

    Computed in double precision, returned in the dtype of the models.  Warns with ``RuntimeWarning`` where the
    iteration has not converged.

    Raises ``ValueError`` naming the model and the parameter for names, shapes, dtypes or devices that do not agree,
    tensors that are not floating-point or not finite; for weights that are negative, not finite, all zero or too
    few; for Fishers that are missing, negative or not finite; and, with "inv" and "mix", for pairs whose logarithm
    does not exist.

    >>> merge_models([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}], weights=[3, 1])
    {'w': tensor([1.5000])}
    """
    for name, value, known in (("method", method, METHODS), ("metric", metric, METRICS)):
        if value not in known:
            raise ValueError(f"{name}: must be one of {', '.join(known)}; found {value!r}")
    if (fishers is None) == (method == "fisher"):
        raise ValueError(f"fishers: belong to method 'fisher', which needs them; found method {method!r} "
                         f"{'without' if fishers is None else 'with'} Fishers")
    models = _checked(models, reference)
    shares = normalised(weights, len(models))
    if fishers is not None:
        return _like(_fisher_mean(models, shares, fishers), models[0])
    if method == "mean" or symmetry is None:
        return _like(weighted_mean(models, shares), models[0])
    aligner = Aligner(symmetry.bind(models[reference]), model, batches, restarts, seed)
    found = quotient_mean(models, shares, symmetry, reference, metric, aligner)
    if not found.converged:
        warnings.warn(f"merge_models: the mean has not converged after {found.iterations} rounds", RuntimeWarning,
                      stacklevel=2)
    return found.params


def _checked(models: Sequence[Params], reference: int) -> list[Params]:
    if isinstance(models, Mapping) or not len(models):
        kind = "a single dict" if isinstance(models, Mapping) else "an empty list"
        raise ValueError(f"models: needed a list of at least one dict of parameters, found {kind}")
    if not 0 <= reference < len(models):
        raise ValueError(f"reference: needed the position of one of the {len(models)} models, found {reference}")
    check_same({f"models[{i}]": model for i, model in enumerate(models)})
    return [{name: model[name].detach() for name in models[0]} for model in models]


def _like(merged: Params, like: Params) -> Params:
    return {name: merged[name].to(p.dtype) for name, p in like.items()}


def _fisher_mean(models: Sequence[Params], weights: Sequence[float], fishers: Sequence[Params]) -> Params:
    """``sum_i w_i F_i th_i / sum_i w_i F_i``, and the plain mean where the denominator is zero."""
    _check_fishers(models, fishers)
    plain, merged = weighted_mean(models, weights), dict[str, Tensor]()
    for name, mean in plain.items():
        weighted = [w * f[name].detach().double() for w, f in zip(weights, fishers)]
        total = torch.stack(weighted).sum(0)
        sums = torch.stack([f * m[name].double() for f, m in zip(weighted, models)]).sum(0)
        merged[name] = torch.where(total > 0, sums / torch.where(total > 0, total, 1.0), mean)
    return merged


def _check_fishers(models: Sequence[Params], fishers: Sequence[Params]) -> None:
    if len(fishers) != len(models):
        raise ValueError(f"fishers: needed one for each of the {len(models)} models, found {len(fishers)}")
    for i, fisher in enumerate(fishers):
        for name, p in models[0].items():
            if name not in fisher:
                raise ValueError(f"fishers[{i}]: parameter {name!r} is missing")
            x = fisher[name]
            if tuple(x.shape) != tuple(p.shape):
                raise ValueError(f"fishers[{i}]: {name!r} must have shape {tuple(p.shape)}, found {tuple(x.shape)}")
            if not bool((torch.isfinite(x) & (x >= 0)).all()):
                raise ValueError(f"fishers[{i}]: {name!r} must be finite and >= 0 everywhere")
