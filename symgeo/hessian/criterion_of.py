"""Any function as a criterion, and the closed form of those that have one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from symgeo.functional import Params
from symgeo.hessian.criteria import BinaryCrossEntropy, Criterion, CrossEntropy, SquaredError, target_of
from symgeo.hessian.derivatives import second_ways
from symgeo.hessian.space import FlatSpace


@dataclass(frozen=True)
class CustomCriterion(Criterion):
    """Any ``function(output, target) -> scalar``, or ``function(output, batch)`` for mappings.

    Derivatives are automatic.  Taken as a mean over the first axis of the outputs where single terms are needed (the
    empirical Fisher).
    """

    function: Callable[..., Tensor]

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        """The value of the function."""
        return self.function(output, batch if isinstance(batch, Mapping) else target_of(batch, ""))

    def curvature(self, output: Tensor, batch: Any) -> Callable[[Tensor], Tensor]:
        """``u -> H_f u`` by automatic differentiation."""
        def value(at: Params) -> Tensor:
            return self(at["output"], batch)

        product = second_ways(value, FlatSpace({"output": output.detach()}))
        return lambda u: product(u.reshape(-1, 1)).view(u.shape).to(u.dtype)

    def score(self, output: Tensor, batch: Any, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``N dL/df``, per element of the first axis."""
        if generator is not None:
            raise ValueError(
                "fisher: a custom criterion has no distribution to draw labels from; pass 'cross_entropy', 'causal', "
                "'mse' or 'bce' (or the torch.nn module), or use ggn or empirical_fisher"
            )
        rows = output.shape[0]
        slope = torch.func.grad(lambda f: self(f, batch))(output).reshape(rows, -1)
        return rows * slope, torch.full_like(slope[:, :1], 1.0 / rows)


def as_criterion(criterion: Any, target: str = "labels") -> Criterion:
    """The criterion of a name, a ``torch.nn`` loss, a `Criterion`, or any function.

    Names: "cross_entropy", "causal" (each position against the next label), "mse", "bce" (on logits).
    ``nn.CrossEntropyLoss``, ``nn.MSELoss`` and ``nn.BCEWithLogitsLoss`` without options become their closed forms;
    with options, and for any other function, derivatives are automatic.

    >>> as_criterion("causal")
    CrossEntropy(target='labels', shift=True, ignore_index=-100, axis=-1)
    """
    if isinstance(criterion, Criterion):
        return criterion
    names = {"cross_entropy": CrossEntropy(target), "causal": CrossEntropy(target, shift=True),
             "mse": SquaredError(target), "bce": BinaryCrossEntropy(target)}
    if isinstance(criterion, str):
        if criterion not in names:
            raise ValueError(f"criterion must be one of {', '.join(names)}, or a function; got {criterion!r}")
        return names[criterion]
    functions = ((nn.functional.mse_loss, names["mse"]), (nn.functional.cross_entropy, CrossEntropy(target, axis=1)),
                 (nn.functional.binary_cross_entropy_with_logits, names["bce"]))
    for function, closed in functions:
        if criterion is function:
            return closed
    mean = isinstance(criterion, nn.Module) and getattr(criterion, "reduction", "") == "mean"
    if mean and isinstance(criterion, nn.MSELoss):
        return names["mse"]
    if mean and isinstance(criterion, nn.CrossEntropyLoss):
        if criterion.weight is None and criterion.label_smoothing == 0:
            return CrossEntropy(target, ignore_index=criterion.ignore_index, axis=1)
    if mean and isinstance(criterion, nn.BCEWithLogitsLoss):
        if criterion.weight is None and criterion.pos_weight is None:
            return names["bce"]
    if not callable(criterion):
        raise ValueError(f"criterion must be a name or a function; got {type(criterion).__name__}")
    return CustomCriterion(criterion)
