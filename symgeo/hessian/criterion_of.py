"""Any function as a criterion, and the closed form of those that have one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from symgeo.hessian.criteria import BinaryCrossEntropy, Criterion, CrossEntropy, SquaredError, target_of

#: parts of a batch on which a criterion is tried to be a mean
_PARTS = 64


@dataclass(frozen=True)
class CustomCriterion(Criterion):
    """Any ``function(output, target) -> scalar``; for mappings ``function(output, batch)``, or the entry ``target``.

    Derivatives are automatic.  Where single terms are needed (the empirical Fisher) it must be a mean over the first
    axis of the outputs, which is tried on parts of the batch.
    """

    function: Callable[..., Tensor]
    target: str | None = None

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        """The value of the function."""
        whole = isinstance(batch, Mapping) and self.target is None
        return self.function(output, batch if whole else target_of(batch, self.target or ""))

    def curvature(self, output: Tensor, batch: Any) -> Callable[[Tensor], Tensor]:
        """``u -> H_f u`` by automatic differentiation: the gradient in ``f`` of ``<dL/df, u>``."""
        slope = torch.func.grad(lambda f: self(f, batch))
        return lambda u: torch.func.vjp(slope, output)[1](u.to(output.dtype))[0].to(u.dtype)

    def score(self, output: Tensor, batch: Any, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``N dL/df``, per element of the first axis."""
        if generator is not None:
            raise ValueError(
                "fisher: a custom criterion has no distribution to draw labels from; pass 'cross_entropy', 'causal', "
                "'mse' or 'bce' (or the torch.nn module), or use ggn or empirical_fisher"
            )
        rows = output.shape[0]
        self._check_mean(output.detach(), batch)
        slope = torch.func.grad(lambda f: self(f, batch))(output).reshape(rows, -1)
        return rows * slope, torch.full_like(slope[:, :1], 1.0 / rows)

    def _check_mean(self, output: Tensor, batch: Any) -> None:
        """``ValueError`` unless the value is the mean of those of up to 64 parts, weighed by their rows."""
        rows = output.shape[0]
        length = -(-rows // _PARTS)
        parts = [(start, min(start + length, rows)) for start in range(0, rows, length)]
        values = [self(output[a:b], _rows(batch, a, b, rows)) * ((b - a) / rows) for a, b in parts]
        mean, whole = torch.stack(values).sum(), self(output, batch)
        if not torch.isclose(whole, mean, rtol=1e-3, atol=1e-6):
            raise ValueError(
                f"empirical_fisher: needed a criterion that is a mean over the first axis of its outputs; found "
                f"{float(whole):.6g} for {rows} rows and {float(mean):.6g} as the mean of {len(parts)} parts.  Pass "
                "one with reduction='mean' and no weights or ignored labels, or 'cross_entropy' or 'causal', which "
                "ignore the label -100"
            )


def _rows(batch: Any, start: int, end: int, rows: int) -> Any:
    """Some rows of whatever in a batch has rows."""
    if isinstance(batch, Tensor):
        return batch[start:end] if batch.ndim and batch.shape[0] == rows else batch
    if isinstance(batch, Mapping):
        return {key: _rows(value, start, end, rows) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)([_rows(value, start, end, rows) for value in batch])
    return batch


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
    return CustomCriterion(criterion, target if isinstance(criterion, nn.modules.loss._Loss) else None)
