"""The curvature matrices of a loss in the coordinates of its parameters, matrix-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from symgeo.functional import Loss, Params
from symgeo.hessian.derivatives import (
    FIRST,
    Columns,
    Function,
    SecondDerivative,
    check_finite_loss,
    check_repeatable,
    differentiable,
    gradient,
    make_symmetric,
    mean_of,
    probes,
    pulled,
)
from symgeo.hessian.model_loss import ModelLoss
from symgeo.hessian.operator import HessianOperator
from symgeo.hessian.space import FlatSpace
from symgeo.sharpness.result import check_count
from symgeo.sharpness.worst_case import batch_list, evaluate

Curvature = Callable[[Tensor], Tensor]


def euclidean_hessian(loss: Loss, params: Params, batches: Iterable[Any], chunk: int | None = None,
                      check: bool = True) -> HessianOperator:
    """The Hessian of the mean loss over the batches, in flat order: exact products, no matrix.

    A product is the forward derivative of the gradient, for several columns at once (``chunk``).  It depends on
    the coordinates: along the orbit of a symmetry its spectrum changes while the function does not; see
    :func:`riemannian_hessian` and :func:`invariant_hessian`.

    ``check`` compares two gradients (dropout) and one pair of products (symmetry).  Fused attention is replaced
    by its plain kernel meanwhile.  Raises ``ValueError`` for a loss that is no scalar, not deterministic, or that
    contains an operation without second derivative, which is named.

    >>> loss = lambda params, batch: (params["w"] ** 3).sum() * batch
    >>> operator = euclidean_hessian(loss, {"w": torch.tensor([1.0, 2.0])}, [1.0, 3.0])
    >>> operator.dense().tolist()
    [[12.0, 0.0], [0.0, 24.0]]
    """
    space, second = second_derivative(loss, params, batches)
    if check:
        second.verified()
    return HessianOperator(second, space, "Hessian", chunk)


def second_derivative(loss: Loss, params: Params, batches: Iterable[Any]) -> tuple[FlatSpace, SecondDerivative]:
    """The flat order of the parameters, and the second derivative of the mean loss over the batches in it."""
    space, data = FlatSpace(params), batch_list(batches)
    return space, SecondDerivative([_loss_of(loss, batch) for batch in data], space)


def _loss_of(loss: Loss, batch: Any) -> Function:
    return lambda params: evaluate(loss, params, batch)


def ggn(loss: ModelLoss, params: Params, batches: Iterable[Any], chunk: int | None = None,
        check: bool = True) -> HessianOperator:
    """The generalized Gauss–Newton matrix, mean over batches of ``J^T H_f J``, exact for any criterion.

    ``J`` is the Jacobian of the outputs, ``H_f`` the Hessian of the criterion in them: for cross-entropy
    ``p * u - p <p, u>``, so nothing of the size of the outputs times the parameters, or of classes times classes,
    is formed.  For exponential families it is the Fisher matrix.
    """
    def curvature(output: Tensor, batch: Any, index: int) -> Curvature:
        return loss.criterion.curvature(output, batch)

    return _sandwich(loss, params, batches, curvature, "GGN", chunk, check)


def empirical_fisher(loss: ModelLoss, params: Params, batches: Iterable[Any], chunk: int | None = None,
                     check: bool = True) -> HessianOperator:
    """``(1/N) sum_n g_n g_n^T`` over the terms of a batch, with the labels of the data; mean over batches.

    A term is one label (a token, for language models); see :mod:`symgeo.hessian.criteria`.
    """
    def curvature(output: Tensor, batch: Any, index: int) -> Curvature:
        scores, weights = loss.criterion.score(output, batch)
        return loss.criterion.scatter(scores.unsqueeze(0), weights)

    return _sandwich(loss, params, batches, curvature, "empirical Fisher", chunk, check)


def fisher(loss: ModelLoss, params: Params, batches: Iterable[Any], samples: int = 1, seed: int = 0,
           chunk: int | None = None, check: bool = True) -> HessianOperator:
    """A Monte-Carlo Fisher matrix: outer products of scores with ``samples`` labels per term drawn from the model.

    Its mean over seeds is the Fisher matrix, which is :func:`ggn`; the seed decides the draw, once, so that the
    operator is one fixed matrix.
    """
    check_count("samples", samples)

    def curvature(output: Tensor, batch: Any, index: int) -> Curvature:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        draws = [loss.criterion.score(output, batch, generator) for _ in range(samples)]
        return loss.criterion.scatter(torch.stack([scores for scores, _ in draws]), draws[0][1])

    return _sandwich(loss, params, batches, curvature, f"Fisher ({samples} samples)", chunk, check)


def _sandwich(loss: ModelLoss, params: Params, batches: Iterable[Any],
              curvature: Callable[[Tensor, Any, int], Curvature], name: str, chunk: int | None,
              check: bool) -> HessianOperator:
    """The mean over batches of ``J^T C J``."""
    if not isinstance(loss, ModelLoss):
        raise ValueError(
            f"{name}: needed a loss split into outputs and criterion, hessian.model_loss(model, criterion) or "
            f"hessian.ModelLoss(outputs, criterion); got {type(loss).__name__}"
        )
    space, data = FlatSpace(params), batch_list(batches)
    outputs = [_outputs_of(loss, batch) for batch in data]
    if check:
        check_repeatable("outputs", lambda: _at(outputs[0], space))
    maps = []
    for index, (function, batch) in enumerate(zip(outputs, data)):
        output = _at(function, space)
        if not output.numel():
            raise ValueError(f"{name}: batch {index} has no rows; the outputs have shape {tuple(output.shape)}")
        maps.append(_congruence(function, space, curvature(output, batch, index)))
        check_finite_loss(loss.criterion(output, batch))
        if check:
            gradient(_loss_of(loss, batch), space)
            make_symmetric(maps[-1], probes(space.point), 0.0, name)
    return HessianOperator(lambda v: mean_of(maps, v), space, name, chunk)


def _outputs_of(loss: ModelLoss, batch: Any) -> Function:
    return lambda params: loss.outputs(params, batch)


def _at(outputs: Function, space: FlatSpace) -> Tensor:
    with differentiable():
        return outputs(space.tangent(space.point)).detach()


def _congruence(outputs: Function, space: FlatSpace, middle: Curvature) -> Columns:
    """``v -> J^T C J v``."""
    def way(push: Callable[[Function, Params, Params], Tensor]) -> Curvature:
        def product(v: Tensor) -> Tensor:
            x = space.tangent(space.point)
            return space.coordinates(pulled(outputs, x, middle(push(outputs, x, space.tangent(v)))))

        return product

    return Columns([way(push) for push in FIRST])
