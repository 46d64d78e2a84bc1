"""Other coordinates for the same functions, and how everything here looks in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from symgeo.functional import Loss, Params
from symgeo.hessian.metrics import Matrix, jacobian_of, pullback_metric

Map = Callable[[Params], Params]
Density = Callable[[Params], Tensor]


@dataclass(frozen=True)
class Reparametrization:
    r"""``psi = forward(theta)`` with ``theta = inverse(psi)``: both maps take and return ``Params``.

    With ``K = d theta / d psi``, in the new coordinates the loss is ``L(inverse(psi))``, the gradient ``K^T dL``, the
    metric ``K^T G K``, and a density gets the factor ``|det K|``.  ``G^-1 (d2L - Gamma dL)`` keeps its spectrum
    (Kristiadi, Dangel, Hennig, arXiv 2302.07384); for a map without an inverse see :func:`pullback_metric`.

    >>> log = Reparametrization(lambda p: {"s": p["w"].log()}, lambda p: {"w": p["s"].exp()})
    >>> log.push({"w": torch.tensor([1.0])})
    {'s': tensor([0.])}
    >>> log.metric(lambda p: torch.eye(1))({"s": torch.tensor([0.0])})
    tensor([[1.]])
    """

    forward: Map
    inverse: Map

    def push(self, params: Params) -> Params:
        """``forward(params)``; ``ValueError`` if ``inverse`` does not undo it there, to the precision of the dtype."""
        new = {name: p.detach() for name, p in self.forward(params).items()}
        back = self.inverse(new)
        for name, p in params.items():
            if name not in back or back[name].shape != p.shape:
                raise ValueError(f"Reparametrization: inverse(forward(params)) lacks {name!r}, {tuple(p.shape)}")
            gap = float((back[name] - p).abs().max()) if p.numel() else 0.0
            bound = torch.finfo(p.dtype).eps ** 0.5 * (1 + float(p.abs().max()) if p.numel() else 1.0)
            if not gap <= bound:
                raise ValueError(f"Reparametrization: inverse does not undo forward: {name!r} comes back changed by "
                                 f"{gap:.1e}")
        return new

    def loss(self, loss: Loss) -> Loss:
        """The loss as a function of the new coordinates."""
        def moved(params: Params, batch: Any) -> Tensor:
            return loss(self.inverse(params), batch)

        return moved

    def metric(self, metric: Matrix | Tensor) -> Matrix:
        """The same metric, a matrix or diagonal or a function of Params, in the new coordinates: ``K^T G K``.

        Its rows stand in the flat order of the Params that ``inverse`` returns, which a function of Params is given.
        """
        if not (isinstance(metric, Tensor) or callable(metric)):
            raise ValueError(f"metric: needed a tensor or a function Params -> tensor; got {type(metric).__name__}")
        return pullback_metric(self.inverse, metric if callable(metric) else lambda params: metric)

    def gradient(self, params: Params, gradient: Params) -> Params:
        """The covector ``K^T gradient`` at ``push(params)``, from a gradient at ``params``."""
        new = self.push(params)
        back, pull, *_ = vjp(self.inverse, new)
        for name, p in back.items():
            if name not in gradient or gradient[name].shape != p.shape:
                raise ValueError(f"gradient: needed an entry {name!r} of shape {tuple(p.shape)}; "
                                 f"found {tuple(gradient[name].shape) if name in gradient else 'none'}")
        (moved,) = pull({name: gradient[name] for name in back})
        return {name: g.detach() for name, g in moved.items()}

    def density(self, log_density: Density) -> Density:
        """The log-density of the new coordinates, ``log p(inverse(psi)) + log |det K|``."""
        def moved(params: Params) -> Tensor:
            volume = torch.linalg.slogdet(jacobian_of(self.inverse, params)).logabsdet
            return log_density(self.inverse(params)) + volume

        return moved
