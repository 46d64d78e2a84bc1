"""Tangent vectors at one point as flat tensors: what the rows and columns of an operator mean."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from symgeo.distributed import refuse_sharded
from symgeo.functional import Params


class Space(ABC):
    """Coordinates of the tangent vectors at a point.

    size : number of coordinates;  dtype, device : of the coordinates
    """

    size: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def tangent(self, z: Tensor) -> Params:
        """The tangent vector with coordinates ``z (size,)``."""

    @abstractmethod
    def coordinates(self, u: Mapping[str, Tensor]) -> Tensor:
        """The coordinates ``(size,)`` of a tangent vector."""

    @abstractmethod
    def same(self, other: Space) -> bool:
        """Whether equal coordinates mean equal vectors in both."""


class FlatSpace(Space):
    """The flat order: the tensors in insertion order, each flattened, concatenated.

    At least single precision; the promoted dtype of the parameters.  Raises ``ValueError`` naming the parameter
    for tensors that are not floating point or not finite, and for vectors of other names or shapes.

    >>> space = FlatSpace({"a": torch.ones(2, 3), "b": torch.zeros(())})
    >>> space.size, space.coordinates({"b": torch.tensor(7.0), "a": torch.ones(2, 3)}).tolist()
    (7, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 7.0])
    """

    def __init__(self, params: Mapping[str, Tensor]):
        if not params:
            raise ValueError("params: needed at least one parameter; the dict is empty")
        refuse_sharded(params, "shards have no second derivatives: gather them with full_tensor(), and split the data "
                               "instead with symgeo.hessian.data_parallel")
        inferred = any(isinstance(p, Tensor) and p.is_inference() for p in params.values())
        if inferred or torch.is_inference_mode_enabled():
            raise ValueError("params: torch.inference_mode() allows no derivatives; use torch.no_grad() instead, and "
                             "make the parameters outside of it")
        for name, p in params.items():
            if not isinstance(p, Tensor) or not p.is_floating_point():
                kind = p.dtype if isinstance(p, Tensor) else type(p).__name__
                raise ValueError(f"params: {name!r} must be a floating-point tensor; got {kind}")
            if not bool(torch.isfinite(p).all()):
                raise ValueError(f"params: {name!r} has entries that are not finite")
        self.shapes = {name: p.shape for name, p in params.items()}
        self.dtypes = {name: p.dtype for name, p in params.items()}
        self.dtype = functools.reduce(torch.promote_types, self.dtypes.values(), torch.float32)
        self.device = next(iter(params.values())).device
        self.size = sum(shape.numel() for shape in self.shapes.values())
        self.point = self.coordinates({name: p.detach() for name, p in params.items()})

    def tangent(self, z: Tensor) -> Params:
        """``z`` cut and reshaped, in the dtypes of the parameters."""
        return {name: piece.to(self.dtypes[name]) for name, piece in self.cut(z).items()}

    def cut(self, z: Tensor) -> Params:
        """``z`` cut and reshaped, in its own dtype."""
        pieces = z.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.reshape(shape) for (name, shape), piece in zip(self.shapes.items(), pieces)}

    def coordinates(self, u: Mapping[str, Tensor]) -> Tensor:
        """The flattened tensors, in the order of the parameters."""
        for name, shape in self.shapes.items():
            if name not in u:
                raise ValueError(f"parameter {name!r} of shape {tuple(shape)} is missing")
            if u[name].shape != shape:
                raise ValueError(f"{name!r} must have shape {tuple(shape)}; got {tuple(u[name].shape)}")
        for name in u:
            if name not in self.shapes:
                raise ValueError(f"{name!r} is not a parameter of this operator")
        return torch.cat([u[name].reshape(-1).to(self.dtype) for name in self.shapes])

    def same(self, other: Space) -> bool:
        """Equal names and shapes in equal order."""
        return isinstance(other, FlatSpace) and list(self.shapes.items()) == list(other.shapes.items())

    def columns(self, names: list[str]) -> Tensor:
        """The positions of some parameters in the flat order."""
        ends, start = {}, 0
        for name, shape in self.shapes.items():
            ends[name] = torch.arange(start, start + shape.numel(), device=self.device)
            start += shape.numel()
        return torch.cat([ends[name] for name in names])
