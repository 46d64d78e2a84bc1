"""Coordinates at one point in which the metric is the identity, and the exponential map in them.

One flat real vector ``z`` holds everything: ``u / w`` for adaptive parameters, balanced and whitened factors for
pairs.  Search and Hessians work on ``z``, where the ball of a metric is an ordinary ball.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from manifolds.frame import PairFrame
from symgeo.functional import Params
from symgeo.kernels import exponential_map
from symgeo.pairs import PairLayout

#: coordinates of the rest ``(..., d)``, and of each batch of pairs ``(..., B, n + m, h)``, real or complex
Pieces = tuple[Tensor, dict[str, Tensor]]


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
            rest, pairs = self.pieces(z)
            if self.zeros:
                rest = torch.where(self.rest == 0, 0.0, rest)
            return self.join(rest, {name: self.frames[name].project(pair) for name, pair in pairs.items()})

    def point(self, z: Tensor, method: str = "exact", t: float | Tensor = 1.0, bound: float | None = None) -> Params:
        """The geodesic from the point with initial velocity ``z``, at time ``t``, in the balanced gauge.

        ``bound`` bounds ``|t z|``.  NaN in pairs whose mix geodesic leaves its domain.
        """
        with torch.autocast(self.device.type, enabled=False):
            rest, pairs = self.pieces(z)
            packed = {"rest": self._rest_curve(rest, t, method)}
            for name, pair in pairs.items():
                packed[name] = self.frames[name].curve(pair, t, method, bound)
            return self._unpack(packed, self.constants)

    def tangent(self, z: Tensor) -> Params:
        """The tangent vector with coordinates ``z`` at the point as it was given (not balanced)."""
        rest, pairs = self.pieces(z)
        packed = {"rest": self._scaled(rest)}
        for name, pair in pairs.items():
            frame = self.exact[name]
            packed[name] = frame.tangent(pair.to(frame.point.dtype)).to(self.frames[name].point.dtype)
        return self._unpack(packed, {name: torch.zeros_like(p) for name, p in self.constants.items()})

    def coordinates(self, u: Params) -> Tensor:
        """The coordinates of a tangent vector at the point as it was given; entries of frozen parameters do not count.

        Raises ``ValueError`` naming the entry that is missing, has another shape, or belongs to no parameter.
        """
        for name, shape in self.layout.shapes.items():
            if name not in u or tuple(u[name].shape) != tuple(shape):
                found = f"shape {tuple(u[name].shape)}" if name in u else "none"
                raise ValueError(f"tangent vector: needed {name!r} of shape {tuple(shape)}; found {found}")
        for name in u:
            if name not in self.order:
                raise ValueError(f"tangent vector: {name!r} is not a parameter of this manifold")
        packed = self.layout.pack(u)
        rest = packed.pop("rest").to(self.dtype)
        if self.adaptive:
            rest = torch.where(self.rest == 0, 0.0, rest / torch.where(self.rest == 0, 1.0, self.rest))
        pairs = {}
        for name, pair in packed.items():
            frame = self.exact[name]
            pairs[name] = frame.coordinates(pair.to(frame.point.dtype)).to(self.frames[name].point.dtype)
        return self.join(rest, pairs)

    def velocity(self, z: Pieces) -> Params:
        """``c'(0)`` of the curve :meth:`point` of ``z``: a tangent vector at the balanced point, frozen parameters out.

        The tensors are in the precision of the chart.
        """
        rest, pairs = z
        speeds = {name: pair / self.frames[name].root for name, pair in pairs.items()}
        return self.layout.unpack({"rest": self._scaled(rest), **speeds})

    def covector(self, slope: Mapping[str, Tensor]) -> Pieces:
        """The adjoint of :meth:`velocity`: what a covector at the balanced point is in coordinates; new tensors."""
        packed = self.layout.pack(slope)
        rest = packed.pop("rest").to(self.dtype)
        if self.adaptive:
            rest *= self.rest
        return rest, {name: pair / self.frames[name].root for name, pair in packed.items()}

    def bent(self, image: Pieces, slope: Pieces, z: Pieces) -> Pieces:
        """``image - <slope, Gamma(z, .)>`` for covectors and vectors ``z`` in coordinates; in place.

        The second term is ``<slope, c''(0)>`` as a bilinear form: ``c'' = z^2`` where parameters are adaptive.
        """
        rest, pairs = image
        if self.adaptive:
            rest.addcmul_(slope[0], z[0])
        for name, pair in pairs.items():
            pair -= self.frames[name].connection(slope[1][name], z[1][name])
        return image

    def complete(self, moved: Mapping[str, Tensor]) -> Params:
        """All parameters, in the order and the dtypes they were given in, from those that are not frozen."""
        return self._completed(moved, self.constants)

    def _completed(self, moved: Mapping[str, Tensor], constants: Params) -> Params:
        dtypes = self.dtypes
        return {name: moved[name].to(dtypes[name]) if name in dtypes else constants[name] for name in self.order}

    def _unpack(self, packed: Mapping[str, Tensor], constants: Params) -> Params:
        return self._completed(self.layout.unpack(packed), constants)

    def _scaled(self, rest: Tensor) -> Tensor:
        return self.rest * rest if self.adaptive else rest

    def _rest_curve(self, z: Tensor, t: float | Tensor, method: str) -> Tensor:
        if not self.adaptive:
            return self.rest + t * z
        step = z if isinstance(t, float) and t == 1.0 else t * z
        if method == "exact":
            return exponential_map(self.rest, step)
        if method == "taylor2":
            return self.rest * (1 + step + 0.5 * step * step)
        return torch.addcmul(self.rest, self.rest, step)

    def pieces(self, z: Tensor) -> Pieces:
        """``z (..., size)`` cut up."""
        rest, *flat = z.split(self.sizes, dim=-1)
        return rest, {name: shaped(piece, f.point.shape, f.point.is_complex())
                      for (name, f), piece in zip(self.frames.items(), flat)}

    def join(self, rest: Tensor, pairs: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`pieces`."""
        return torch.cat([rest, *(flattened(pair) for pair in pairs.values())], dim=-1)


def shaped(flat: Tensor, shape: Sequence[int], complex_numbers: bool) -> Tensor:
    """Real numbers ``(..., size)`` as pairs ``(..., B, n + m, h)``, real or complex."""
    if not complex_numbers:
        return flat.unflatten(-1, tuple(shape))
    return torch.complex(*flat.unflatten(-1, (*shape, 2)).unbind(-1))


def flattened(pairs: Tensor) -> Tensor:
    """The inverse of :func:`shaped`."""
    return torch.view_as_real(pairs.contiguous()).flatten(-4) if pairs.is_complex() else pairs.flatten(-3)
