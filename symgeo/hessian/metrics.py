"""Metrics on parameter space, as what the covariant Hessian needs: products and an inverse square root."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from manifolds.linalg import eigh, gram
from symgeo.functional import Params
from symgeo.hessian.frames import DenseFrame, DiagonalFrame, Frame, KroneckerFrame, check_symmetric, split_spectrum
from symgeo.hessian.model_loss import ModelLoss
from symgeo.hessian.space import FlatSpace
from symgeo.sharpness.worst_case import batch_list

Matrix = Callable[[Params], Tensor]
Factors = Mapping[str, tuple[Tensor | None, Tensor | None]]


class Metric(ABC):
    """A metric ``G(x)`` on a flat space, by its products and its inverse square root at the point."""

    @abstractmethod
    def lower(self, space: FlatSpace, x: Tensor, u: Tensor) -> Tensor:
        """``G(x) u``, differentiable in ``x``."""

    @abstractmethod
    def frame(self, space: FlatSpace, pinv: bool) -> Frame:
        """``E`` with ``E E^T = G^-1`` at the point of the space, or the pseudo-inverse."""


class MatrixMetric(Metric):
    """A metric given as a symmetric matrix ``(d, d)`` or a diagonal ``(d,)``, constant or a function of Params."""

    def __init__(self, value: Tensor | Matrix):
        self.value = value

    def matrix(self, space: FlatSpace, x: Tensor) -> Tensor:
        """``G(x)``, checked for its shape."""
        g = self.value if isinstance(self.value, Tensor) else self.value(space.tangent(x))
        if not isinstance(g, Tensor) or g.shape not in ((space.size,), (space.size, space.size)):
            found = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
            raise ValueError(f"metric: needed a matrix ({space.size}, {space.size}) or a diagonal ({space.size},) for "
                             f"{space.size} parameters; got {found}")
        return g.to(x)

    def lower(self, space: FlatSpace, x: Tensor, u: Tensor) -> Tensor:
        """``G(x) u``."""
        g = self.matrix(space, x)
        return g * u if g.ndim == 1 else g @ u

    def frame(self, space: FlatSpace, pinv: bool) -> Frame:
        """By ``eigh``, or entry by entry; ``ValueError`` for a metric that is indefinite, or singular."""
        g = self.matrix(space, space.point).detach()
        if g.ndim == 1:
            return DiagonalFrame(g, split_spectrum(g, pinv, computed=False))
        if not bool(torch.isfinite(g).all()):
            raise ValueError("metric: needed finite entries at the parameters")
        check_symmetric(g)
        values, vectors = eigh(g)
        return DenseFrame(values, vectors, split_spectrum(values, pinv))


class KroneckerMetric(Metric):
    """``<W, W> = sum_p tr(W^T B_p W A_p)``: a Kronecker factor for each side of some of the parameters.

    factors : ``{name: (B (m, m), A (n, n))}``, or a function of Params that gives it, for parameters seen as matrices
        ``W (m, n)`` (all but the last axis are rows; a vector is one row); None stands for the identity, as for
        parameters that are not named
    """

    def __init__(self, factors: Factors | Callable[[Params], Factors]):
        self.factors = factors

    def at(self, space: FlatSpace, x: Tensor) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """The factors at ``x``, checked for their names and shapes."""
        found = dict(self.factors(space.tangent(x)) if callable(self.factors) else self.factors)
        for name, pair in found.items():
            if name not in space.shapes:
                raise ValueError(f"metric: {name!r} is not a parameter")
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"metric: {name!r} needs two factors, (left, right), of which either may be None")
            shape = matrix_shape(space.shapes[name])
            for side, factor, size in zip(("left", "right"), pair, shape):
                if factor is not None and factor.shape != (size, size):
                    raise ValueError(f"metric: the {side} factor of {name!r} must be ({size}, {size}); "
                                     f"got {tuple(factor.shape)}")
        return found

    def lower(self, space: FlatSpace, x: Tensor, u: Tensor) -> Tensor:
        """``B W A`` for every parameter."""
        factors, pieces = self.at(space, x), []
        for (name, shape), piece in zip(space.shapes.items(), u.split([s.numel() for s in space.shapes.values()])):
            left, right = factors.get(name, (None, None))
            w = piece.reshape(matrix_shape(shape))
            w = w if left is None else left.to(w) @ w
            pieces.append((w if right is None else w @ right.to(w)).reshape(-1))
        return torch.cat(pieces)

    def frame(self, space: FlatSpace, pinv: bool) -> Frame:
        """``B^-1/2 W A^-1/2``; a singular factor is refused, ``pinv`` or not."""
        return KroneckerFrame(self.at(space, space.point), space.shapes)


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix."""
    return (shape[:-1].numel(), shape[-1]) if shape else (1, 1)


def kronecker_metric(factors: Factors | Callable[[Params], Factors]) -> KroneckerMetric:
    """``B (x) A`` for each named parameter (row-major ``W (m, n)``: ``B W A``); see `KroneckerMetric`."""
    return KroneckerMetric(factors)


def pullback_metric(map: Callable[[Params], Tensor | Params], inner: Matrix | None = None) -> Matrix:
    """``G = J^T J`` with the Jacobian of a map of the parameters: lengths are those of its values.

    map : Params -> tensor or Params (in flat order);  inner : a metric ``Params -> (m, m)`` or ``(m,)`` on its values
        (which then are Params), for ``J^T G' J``

    Singular where the map has directions that do nothing, as weight normalisation has: then use ``pinv=True``.

    >>> metric = pullback_metric(lambda p: p["w"].exp())
    >>> metric({"w": torch.tensor([0.0, 1.0], dtype=torch.float64)}).diagonal().log().tolist()
    [0.0, 2.0]
    """
    def metric(params: Params) -> Tensor:
        jacobian = jacobian_of(map, params)
        if inner is None:
            return gram(jacobian)
        g = inner(_as_params(map(params)))
        if g.shape not in (jacobian.shape[:1], jacobian.shape[:1] * 2):
            raise ValueError(f"metric: needed a matrix ({len(jacobian)}, {len(jacobian)}) or a diagonal "
                             f"({len(jacobian)},); got {tuple(g.shape)}")
        return jacobian.T @ (g.unsqueeze(1) * jacobian if g.ndim == 1 else g @ jacobian)

    return metric


def jacobian_of(map: Callable[[Params], Tensor | Params], params: Params) -> Tensor:
    """``(m, d)``, both in flat order, by reverse mode: it may be differentiated again in either mode.

    Row by row: in torch 2.13 the derivative of a ``vmap`` over the backward pass of ``layer_norm`` is wrong.
    """
    space = _shapes_of(params)

    def flat(x: Tensor) -> Tensor:
        value = map(space(x))
        return value.reshape(-1) if isinstance(value, Tensor) else torch.cat([v.reshape(-1) for v in value.values()])

    value, pull = vjp(flat, torch.cat([p.reshape(-1) for p in params.values()]))[:2]
    return torch.stack([pull(row)[0] for row in torch.eye(value.numel(), dtype=value.dtype, device=value.device)])


def _shapes_of(params: Params) -> Callable[[Tensor], Params]:
    sizes = [p.numel() for p in params.values()]
    return lambda x: {name: piece.reshape(p.shape) for (name, p), piece in zip(params.items(), x.split(sizes))}


def _as_params(value: Tensor | Params) -> Params:
    if isinstance(value, Tensor):
        raise ValueError("pullback_metric: with an inner metric the map must return Params")
    return value


def fisher_metric(loss: ModelLoss, batches: Iterable[Any]) -> Matrix:
    """The Fisher metric as a dense ``(d, d)`` function of Params: mean over batches of ``J^T H_f J``, with no damping.

    It forms the Jacobian of all outputs, so it is for small models; :func:`symgeo.hessian.ggn` has the same matrix
    as products.  Add a multiple of the identity where it is singular.
    """
    data = batch_list(batches)

    def metric(params: Params) -> Tensor:
        total = torch.zeros((), dtype=next(iter(params.values())).dtype)
        for batch in data:
            output = loss.outputs(params, batch)
            jacobian = jacobian_of(partial(_outputs, loss, batch), params)
            product = loss.criterion.curvature(output, batch)
            shaped = jacobian.T.reshape(-1, *output.shape)
            total = total + vmap(product)(shaped).flatten(1) @ jacobian
        return total / len(data)

    return metric


def _outputs(loss: ModelLoss, batch: Any, params: Params) -> Tensor:
    return loss.outputs(params, batch)
