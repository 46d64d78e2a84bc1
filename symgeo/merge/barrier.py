"""The loss along a path between two models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch

from symgeo.functional import Loss, Params
from symgeo.merge.align_checks import check_same


@dataclass(frozen=True)
class Barrier:
    """The loss along a path.

    t : the times, from 0 to 1;  losses : the loss at each of them;
    height : ``max_t [L(t) - ((1 - t) L(0) + t L(1))]``, at least 0.

    >>> Barrier((0.0, 0.5, 1.0), (1.0, 4.0, 3.0)).height
    2.0
    """

    t: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def height(self) -> float:
        """How far the loss rises above the line between its ends."""
        first, last = self.losses[0], self.losses[-1]
        return max(loss - ((1 - t) * first + t * last) for t, loss in zip(self.t, self.losses))

    def to_dict(self) -> dict[str, Any]:
        """Times, losses and height, for JSON."""
        return {"t": list(self.t), "losses": list(self.losses), "height": self.height}


@torch.no_grad()
def barrier(
    loss: Loss,
    a: Params,
    b: Params,
    batches: Iterable[Any],
    points: int = 11,
    path: str | Callable[[float], Params] = "linear",
) -> Barrier:
    """The mean loss over the batches at evenly spaced points of a path from model a to model b.

    ``path`` is "linear", ``(1 - t) a + t b``, or a function of t that gives parameters, such as a geodesic.  Align
    b with a first to take the barrier modulo a symmetry.  Every batch counts alike.

    Raises ``ValueError`` for fewer than 3 points, no batches, models that do not agree, and where the loss is not
    finite.

    >>> square = lambda params, batch: (params["w"] ** 2).mean()
    >>> barrier(square, {"w": torch.tensor([-1.0])}, {"w": torch.tensor([1.0])}, [None], points=3).losses
    (1.0, 0.0, 1.0)
    """
    if points < 3:
        raise ValueError(f"points: needed at least 3, the ends and one between them; found {points}")
    if isinstance(path, str) and path != "linear":
        raise ValueError(f"path: must be 'linear' or a function of t, found {path!r}")
    check_same({"a": a, "b": b})
    listed = list(batches)
    if not listed:
        raise ValueError("batches: needed at least one, found none")
    times = [i / (points - 1) for i in range(points)]
    losses = []
    for t in times:
        params = {name: a[name].lerp(b[name], t) for name in a} if isinstance(path, str) else path(t)
        losses.append(sum(float(loss(params, batch)) for batch in listed) / len(listed))
        if not isfinite(losses[-1]):
            raise ValueError(f"loss: must be finite along the path, found {losses[-1]} at t = {t:g}")
    return Barrier(tuple(times), tuple(losses))
