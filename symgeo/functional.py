"""Losses as functions of parameters: the one signature ``loss(params, batch) -> scalar tensor``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from symgeo.errors import RecomputationError

Params = dict[str, Tensor]
Loss = Callable[[Params, Any], Tensor]

#: what is open until the block of `recomputable` ends
_OPEN: ContextVar[ExitStack | None] = ContextVar("open", default=None)
#: how modules say that they recompute activations: an attribute (transformers, timm), or a class (torch)
_FLAGS, _WRAPPER = ("gradient_checkpointing", "grad_checkpointing"), "CheckpointWrapper"


@contextmanager
def recomputable() -> Iterator[None]:
    """A block with one evaluation of a loss, and its backward passes: activation checkpoints are honoured in it.

    A checkpoint computes its part of the model again during the backward pass, with what the module then holds: so
    the parameters that a loss is called with stay in the module until the block ends.  Outside of such a block they
    are taken out at once.  In one block all calls of a module must be with the same parameters.
    """
    with ExitStack() as stack:
        token = _OPEN.set(stack)
        try:
            yield
        finally:
            _OPEN.reset(token)


def outputs_of(model: nn.Module, params: Params, args: tuple[Any, ...] = (), keywords: Mapping[str, Any] = {}) -> Any:
    """What a module returns with these parameters, through ``torch.func.functional_call``.

    The module is not changed: statistics that it keeps in training mode go to copies.
    Raises ``RecomputationError`` for parameters in a module with activation checkpoints, outside of `recomputable`.

    >>> norm = nn.BatchNorm1d(2)
    >>> outputs_of(norm, {}, (torch.randn(5, 2),)).shape, int(norm.num_batches_tracked)
    (torch.Size([5, 2]), 0)
    """
    copies: Params = {}
    if any(module.training for module in model.modules()):
        copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    stack = _OPEN.get()
    if params and stack is not None:
        stack.enter_context(_holding(model, {**copies, **params}))
        return model(*args, **keywords)
    if params and torch.is_grad_enabled():
        _refuse_checkpoints(model)
    return torch.func.functional_call(model, {**copies, **params}, args, dict(keywords))


def _refuse_checkpoints(model: nn.Module) -> None:
    for name, module in model.named_modules():
        flagged = module.training and any(getattr(module, flag, False) is True for flag in _FLAGS)
        if flagged or type(module).__name__ == _WRAPPER:
            raise RecomputationError(
                f"module {name or type(module).__name__!r} has activation checkpoints, which would compute it again "
                "without these parameters; switch them off (in transformers: model.gradient_checkpointing_disable()), "
                "or measure the module itself with symgeo.in_place_sharpness"
            )


@contextmanager
def _holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other tensors, by name, in all places of a tied one."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for key, x in table.items():
                places.setdefault(id(x), []).append((table, key))
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    unknown = [name for name in tensors if name not in own]
    if unknown:
        raise ValueError(f"params: {type(model).__name__} has no parameter {unknown[0]!r}")
    try:
        for name, x in tensors.items():
            for table, key in places[id(own[name])]:
                table[key] = x
        yield
    finally:
        for name in tensors:
            for table, key in places[id(own[name])]:
                table[key] = own[name]


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
