"""Losses that know their two halves: the model's outputs, and the criterion on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from symgeo.functional import Params, outputs_of
from symgeo.hessian.criteria import Criterion
from symgeo.hessian.criterion_of import as_criterion


@dataclass(frozen=True)
class ModelLoss:
    """``L(params, batch) = criterion(outputs(params, batch), batch)``: a loss like any other, and splittable.

    Gauss–Newton and Fisher matrices need the split.  See :func:`model_loss`.
    """

    outputs: Callable[[Params, Any], Tensor]
    criterion: Criterion

    def __call__(self, params: Params, batch: Any) -> Tensor:
        """The loss of a batch."""
        return self.criterion(self.outputs(params, batch), batch)


def model_loss(model: nn.Module, criterion: Any, target: str = "labels") -> ModelLoss:
    """The loss of a module and a criterion, through ``torch.func.functional_call``; the module is not changed.

    model : its output is a tensor, or has ``.logits`` (transformers)
    criterion : "cross_entropy", "causal", "mse", "bce", a ``torch.nn`` loss, or ``function(output, y)``; see
        :func:`symgeo.hessian.criterion_of.as_criterion`
    target : the key of the labels in batches that are mappings; all other keys go to the model.  Otherwise a batch
        is ``(x, y)``.

    ``params`` may be any subset of the named parameters: the others keep their values.
    Call ``model.eval()`` first: dropout makes the loss a random function.

    >>> import torch
    >>> loss = model_loss(nn.Linear(2, 3), "cross_entropy")
    >>> params = {"bias": torch.zeros(3)}
    >>> loss(params, (torch.zeros(5, 2), torch.zeros(5, dtype=torch.long)))  # log 3
    tensor(1.0986, grad_fn=<NllLossBackward0>)
    """

    def outputs(params: Params, batch: Any) -> Tensor:
        if isinstance(batch, Mapping):
            inputs = {key: value for key, value in batch.items() if key != target}
            output = outputs_of(model, params, (), inputs)
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            output = outputs_of(model, params, (batch[0],))
        else:
            raise ValueError(f"a batch must be (x, y) or a mapping; got {type(batch).__name__}")
        output = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if output is None:
            raise ValueError(f"{type(model).__name__} returned neither a tensor nor something with .logits")
        return output

    return ModelLoss(outputs, as_criterion(criterion, target))
