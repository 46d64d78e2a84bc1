"""Losses as functions of parameters: the one signature ``loss(params, batch) -> scalar tensor``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]
Loss = Callable[[Params, Any], Tensor]


def outputs_of(model: nn.Module, params: Params, args: tuple[Any, ...] = (), keywords: Mapping[str, Any] = {}) -> Any:
    """What a module returns with these parameters, through ``torch.func.functional_call``.

    The module is not changed: statistics that it keeps in training mode go to copies.

    >>> norm = nn.BatchNorm1d(2)
    >>> outputs_of(norm, {}, (torch.randn(5, 2),)).shape, int(norm.num_batches_tracked)
    (torch.Size([5, 2]), 0)
    """
    copies: Params = {}
    if any(module.training for module in model.modules()):
        copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, {**copies, **params}, args, dict(keywords))


def functional_loss(model: nn.Module, criterion: Callable[..., Tensor] | None = None) -> Loss:
    """``loss(params, batch)`` of a module, through ``torch.func.functional_call``; the module is not changed.

    A batch is ``(x, y)``, for ``criterion(model(x), y)``, or a mapping of keyword arguments, for
    ``criterion(model(**batch), batch)`` and, without a criterion, ``model(**batch).loss``.
    ``params`` may be any subset of ``dict(model.named_parameters())``: the others keep their values.
    Call ``model.eval()`` first: dropout makes the loss a random function.

    Raises ``ValueError`` for a batch of another kind, or where a criterion is needed and none was given.

    >>> model = nn.Linear(2, 1)
    >>> loss = functional_loss(model, nn.functional.mse_loss)
    >>> loss(dict(model.named_parameters()), (torch.ones(3, 2), torch.ones(3, 1))).shape
    torch.Size([])
    """

    def loss(params: Params, batch: Any) -> Tensor:
        if isinstance(batch, Mapping):
            output = outputs_of(model, params, (), batch)
            if criterion is not None:
                return criterion(output, batch)
            value = getattr(output, "loss", None)
            if value is None:
                raise ValueError(
                    f"functional_loss: {type(model).__name__} returned no .loss for the batch keys {sorted(batch)}; "
                    "add labels to the batch, or pass a criterion(output, batch)"
                )
            return value
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            if criterion is None:
                raise ValueError("functional_loss: (x, y) batches need a criterion, e.g. torch.nn.CrossEntropyLoss()")
            return criterion(outputs_of(model, params, (batch[0],)), batch[1])
        raise ValueError(f"functional_loss: a batch must be (x, y) or a mapping; got {type(batch).__name__}")

    return loss
