"""What several models must have in common before they are compared or averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from symgeo.distributed import refuse_sharded
from symgeo.functional import Params


def check_same(models: Mapping[str, Params]) -> None:
    """Raise ``ValueError`` naming the model and the parameter unless names, shapes, dtypes and devices agree.

    Every tensor must be floating-point with finite entries.

    >>> check_same({"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(3)}})
    Traceback (most recent call last):
    ValueError: b: parameter 'w' has shape (3,), but shape (2,) in a
    """
    first, reference = next(iter(models.items()))
    if not reference:
        raise ValueError(f"{first}: needed at least one parameter; the dict is empty")
    for label, params in models.items():
        refuse_sharded(params, "gather them with full_tensor()")
        for name in params:
            if name not in reference:
                raise ValueError(f"{label}: parameter {name!r} is not in {first}; the models must have the same names")
        for name, like in reference.items():
            if name not in params:
                raise ValueError(f"{label}: parameter {name!r} of {first} is missing")
            _check_tensor(label, name, params[name])
            for what, found, needed in _facts(params[name], like):
                if found != needed:
                    raise ValueError(f"{label}: parameter {name!r} has {what} {found}, but {what} {needed} in {first}")


def _facts(x: Tensor, like: Tensor) -> list[tuple[str, object, object]]:
    return [("shape", tuple(x.shape), tuple(like.shape)), ("dtype", x.dtype, like.dtype),
            ("device", x.device, like.device)]


def _check_tensor(label: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{label}: parameter {name!r} must be a floating-point tensor; found {kind}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{label}: parameter {name!r} has entries that are not finite")


def normalised(weights: Sequence[float] | Tensor | None, number: int) -> list[float]:
    """Weights of a mean of so many models: finite, >= 0, divided by their sum; equal ones for None.

    >>> normalised([1, 3], 2)
    [0.25, 0.75]
    """
    if weights is None:
        return [1.0 / number] * number
    values = [float(w) for w in weights]
    if len(values) != number:
        raise ValueError(f"weights: needed one number for each of the {number} models, found {len(values)}")
    total = sum(values)
    if not all(isfinite(w) and w >= 0 for w in values) or total == 0 or not isfinite(total):
        raise ValueError(f"weights: a mean needs finite numbers >= 0 that are not all zero, found {values}")
    return [w / total for w in values]
