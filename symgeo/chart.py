"""Coordinates at one point in which the metric is the identity, and the exponential map in them.

One flat real vector ``z`` holds everything: ``u / w`` for adaptive parameters, balanced and whitened factors for
pairs.  Search and Hessians work on ``z``, where the ball of a metric is an ordinary ball.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from manifolds.frame import PairFrame
from symgeo.functional import Params
from symgeo.pairs import PairLayout


class Chart:
    """Orthonormal coordinates of the tangent space at a point; points come back in the *balanced gauge*.

    The balanced gauge has equal, diagonal Gram matrices in every pair: it is the same function as the point
    that was given, and the same coordinates whichever gauge that was in.
    """

    def __init__(self, layout: PairLayout, params: Params, adaptive: bool, frames: Mapping[str, PairFrame]):
        self.layout, self.adaptive = layout, adaptive
        self.constants = {name: p for name, p in params.items() if name not in layout.shapes}
        self.order, self.dtypes = list(params), {name: params[name].dtype for name in layout.shapes}
        self.dtype = functools.reduce(torch.promote_types, self.dtypes.values(), torch.float32)
        rest = layout.pack(params)["rest"].to(self.dtype)
        self.rest, self.device = rest, rest.device
        self.exact = dict(frames)
        self.frames = {name: frame.to(self.dtype) for name, frame in frames.items()}
        self.sizes = [rest.numel(), *(f.point.numel() * (2 if f.point.is_complex() else 1) for f in frames.values())]
        self.zeros = int((rest == 0).sum()) if adaptive else 0
        self.pairs = layout.pairs
        self.relaxed = sum(int(f.deficient.sum()) for f in frames.values())

    @property
    def size(self) -> int:
        """Length of ``z`` (the vertical directions included)."""
        return sum(self.sizes)

    def origin(self) -> Tensor:
        """The coordinates of the point itself."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def random(self, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal coordinates, horizontal."""
        device = generator.device if generator is not None else self.device
        z = torch.randn(self.size, dtype=self.dtype, device=device, generator=generator)
        return self.project(z.to(self.device))

    def project(self, z: Tensor) -> Tensor:
        """Orthogonal projection onto the horizontal space (and onto the parameters that are not zero)."""
        if not self.frames and not self.zeros:
            return z
        with torch.autocast(self.device.type, enabled=False):
            rest, pairs = self._pieces(z)
            if self.zeros:
                rest = torch.where(self.rest == 0, 0.0, rest)
            return self._join(rest, {name: self.frames[name].project(pair) for name, pair in pairs.items()})

    def point(self, z: Tensor, method: str = "exact", t: float | Tensor = 1.0, bound: float | None = None) -> Params:
        """The geodesic from the point with initial velocity ``z``, at time ``t``, in the balanced gauge.

        ``bound`` bounds ``|t z|``.  NaN in pairs whose mix geodesic leaves its domain.
        """
        with torch.autocast(self.device.type, enabled=False):
            rest, pairs = self._pieces(z)
            packed = {"rest": self._rest_curve(rest, t, method)}
            for name, pair in pairs.items():
                packed[name] = self.frames[name].curve(pair, t, method, bound)
            return self._unpack(packed, self.constants)

    def tangent(self, z: Tensor) -> Params:
        """The tangent vector with coordinates ``z`` at the point as it was given (not balanced)."""
        rest, pairs = self._pieces(z)
        packed = {"rest": self.rest * rest if self.adaptive else rest}
        for name, pair in pairs.items():
            frame = self.exact[name]
            packed[name] = frame.tangent(pair.to(frame.point.dtype)).to(self.frames[name].point.dtype)
        return self._unpack(packed, {name: torch.zeros_like(p) for name, p in self.constants.items()})

    def coordinates(self, u: Params) -> Tensor:
        """The coordinates of a tangent vector at the point as it was given."""
        packed = self.layout.pack(u)
        rest = packed.pop("rest").to(self.dtype)
        if self.adaptive:
            rest = torch.where(self.rest == 0, 0.0, rest / torch.where(self.rest == 0, 1.0, self.rest))
        pairs = {}
        for name, pair in packed.items():
            frame = self.exact[name]
            pairs[name] = frame.coordinates(pair.to(frame.point.dtype)).to(self.frames[name].point.dtype)
        return self._join(rest, pairs)

    def _unpack(self, packed: Mapping[str, Tensor], constants: Params) -> Params:
        moved = {name: tensor.to(self.dtypes[name]) for name, tensor in self.layout.unpack(packed).items()}
        return {name: moved[name] if name in moved else constants[name] for name in self.order}

    def _rest_curve(self, z: Tensor, t: float | Tensor, method: str) -> Tensor:
        if not self.adaptive:
            return self.rest + t * z
        step = z if isinstance(t, float) and t == 1.0 else t * z
        if method == "exact":
            return self.rest * step.exp()
        if method == "taylor2":
            return self.rest * (1 + step + 0.5 * step * step)
        return torch.addcmul(self.rest, self.rest, step)

    def _pieces(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rest, *pieces = z.split(self.sizes)
        pairs = {}
        for (name, frame), piece in zip(self.frames.items(), pieces):
            if frame.point.is_complex():
                piece = torch.complex(*piece.view(-1, 2).unbind(-1))
            pairs[name] = piece.view(frame.point.shape)
        return rest, pairs

    def _join(self, rest: Tensor, pairs: Mapping[str, Tensor]) -> Tensor:
        flat = [torch.view_as_real(pair.contiguous()) if pair.is_complex() else pair for pair in pairs.values()]
        return torch.cat([rest, *(piece.reshape(-1) for piece in flat)])
