"""Named products of manifolds, on dictionaries of tensors or on one packed tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from manifolds.base import QuotientManifold

Point = TypeVar("Point", Tensor, dict[str, Tensor])


class Product(QuotientManifold):
    """The product of named manifolds with the sum of their metrics: ``<u, v>_x = sum_k <u_k, v_k>_{x_k}``.

    Points and vectors are dictionaries ``{name: tensor}``; the batch dimensions of each factor are summed
    too, so that ``inner``, ``norm`` and ``dist`` are scalars.

    With ``shapes = {name: shape of one point}`` they may also be single tensors ``(..., N)``, the flattened
    factors one after the other (see ``pack_point``), with the leading dimensions as a batch: that is the form
    for ``geoopt.ManifoldParameter``.

    Raises ``ValueError`` for missing or unknown factors, for shapes that disagree, and for packed tensors of
    another size than the shapes say.

    >>> from manifolds.elementwise import Elementwise
    >>> from manifolds.scale import ScaleQuotient
    >>> m = Product({"gain": Elementwise(), "weight": ScaleQuotient()}, shapes={"gain": (2,), "weight": (3,)})
    >>> x = {"gain": torch.ones(2), "weight": torch.ones(3)}
    >>> m.inner(x, x).item(), m.pack_point(x).shape
    (3.0, torch.Size([5]))
    """

    name = "Product"
    ndim = 1

    def __init__(
        self, manifolds: Mapping[str, QuotientManifold], shapes: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        super().__init__()
        if not manifolds:
            raise ValueError("Product needs at least one factor; got none")
        self.names = tuple(manifolds)
        self.manifolds = torch.nn.ModuleList(manifolds.values())
        self.shapes: dict[str, torch.Size] | None = None
        if shapes is not None:
            _same_names(self.names, shapes, "shapes")
            self.shapes = {name: torch.Size(shapes[name]) for name in self.names}

    @property
    def factors(self) -> dict[str, Any]:
        """The factors by name."""
        return dict(zip(self.names, self.manifolds))

    # ---- one tensor or a dictionary: decided here and nowhere else

    def pack_point(self, *tensors: Any) -> Tensor:
        """One tensor ``(..., N)`` from a dictionary, or from one tensor per factor in their order."""
        if len(tensors) == 1 and isinstance(tensors[0], Mapping):
            parts = dict(tensors[0])
        elif len(tensors) == len(self.names):
            parts = dict(zip(self.names, tensors))
        else:
            raise ValueError(f"pack_point needs a dictionary or {len(self.names)} tensors; got {len(tensors)}")
        _same_names(self.names, parts, "point")
        flat = []
        for name, shape in self._shapes().items():
            part = parts[name]
            lead = part.ndim - len(shape)
            if lead < 0 or part.shape[lead:] != shape:
                raise ValueError(f"factor {name!r} needs shape (..., {_text(shape)}); got ({_text(part.shape)})")
            flat.append(part.reshape(*part.shape[:lead], -1))
        return torch.cat(flat, dim=-1)

    def unpack_tensor(self, tensor: Tensor) -> dict[str, Tensor]:
        """The factors ``{name: (..., *shape)}`` of a packed tensor ``(..., N)``."""
        shapes = self._shapes()
        ok, reason = self._check_shape(tensor.shape, "point")
        if not ok:
            raise ValueError(reason)
        parts = tensor.split([math.prod(shape) for shape in shapes.values()], dim=-1)
        return {name: p.reshape(*tensor.shape[:-1], *shapes[name]) for name, p in zip(self.names, parts)}

    def _shapes(self) -> dict[str, torch.Size]:
        if self.shapes is None:
            raise ValueError("packed tensors need Product(manifolds, shapes={name: shape})")
        return self.shapes

    def _split(self, *points: Any) -> list[dict[str, Tensor]]:
        """The arguments by factor, checked against each other."""
        parts = [dict(p) if isinstance(p, Mapping) else self.unpack_tensor(p) for p in points]
        for part in parts:
            _same_names(self.names, part, "point")
        for part in parts[1:]:
            for name in self.names:
                a, b = parts[0][name].shape, part[name].shape
                if a != b:
                    raise ValueError(f"factor {name!r}: shapes ({_text(a)}) and ({_text(b)}) disagree")
        return parts

    def _map(self, method: Callable[..., Tensor], *points: Point) -> Point:
        """``method(manifold, *parts)`` for every factor, in the form of the first point."""
        parts = self._split(*points)
        out = {name: method(factor, *(p[name] for p in parts)) for name, factor in self.factors.items()}
        return out if isinstance(points[0], Mapping) else self.pack_point(out)

    def _terms(self, method: Callable[..., Tensor], *points: Any) -> Tensor:
        """``method(manifold, *parts)`` of every factor, ``(..., terms)``: all dimensions that are not batch."""
        parts = self._split(*points)
        lead = 0 if isinstance(points[0], Mapping) else points[0].ndim - 1
        terms = [method(factor, *(p[name] for p in parts)) for name, factor in self.factors.items()]
        return torch.cat([t.reshape(*t.shape[:lead], -1) for t in terms], dim=-1)

    # ---- the manifold, factor by factor

    def inner(self, x: Any, u: Any, v: Any = None, *, keepdim: bool = False) -> Tensor:
        """``sum_k <u_k, v_k>``."""
        return self._terms(lambda m, *a: m.inner(*a), x, u, u if v is None else v).sum(-1, keepdim=keepdim)

    def component_inner(self, x: Point, u: Point, v: Point | None = None) -> Point:
        """The inner product of each factor, repeated over its entries: adaptive optimizers see them apart."""
        return self._map(lambda m, *a: m.component_inner(*a).expand_as(a[0]), x, u, u if v is None else v)

    def proju(self, x: Point, u: Point) -> Point:
        """Onto the product of the horizontal spaces."""
        return self._map(lambda m, *a: m.proju(*a), x, u)

    def egrad2rgrad(self, x: Point, u: Point) -> Point:
        """The Riemannian gradients of the factors."""
        return self._map(lambda m, *a: m.egrad2rgrad(*a), x, u)

    def vertical(self, x: Point, algebra: Any) -> Point:
        """The vertical vectors generated by ``{name: algebra element}``."""
        _same_names(self.names, algebra, "algebra")
        rest = iter(algebra[name] for name in self.names)
        return self._map(lambda m, p: m.vertical(p, next(rest)), x)

    def christoffel(self, x: Point, u: Point) -> Point:
        """``Gamma(u, u)``, factor by factor."""
        return self._map(lambda m, *a: m.christoffel(*a), x, u)

    def geodesic(self, x: Point, u: Point, method: str = "exact") -> Callable[[float | Tensor], Point]:
        """The product of the factors' geodesics."""
        x_parts, u_parts = self._split(x, u)
        curves = {k: m.geodesic(x_parts[k], u_parts[k], method) for k, m in self.factors.items()}

        def curve(t: float | Tensor) -> Point:
            out = {name: c(t) for name, c in curves.items()}
            return out if isinstance(x, Mapping) else self.pack_point(out)

        return curve

    def logmap(self, x: Point, y: Point) -> Point:
        """The factors' logarithms; raises ``ValueError`` where one of them does."""
        return self._map(lambda m, *a: m.logmap(*a), x, y)

    def dist(self, x: Any, y: Any, *, keepdim: bool = False) -> Tensor:
        """``(sum_k dist_k^2)^{1/2}``."""
        return torch.linalg.vector_norm(self._terms(lambda m, *a: m.dist(*a), x, y), dim=-1, keepdim=keepdim)

    def transp(self, x: Point, y: Point, v: Point) -> Point:
        """The factors' transports."""
        return self._map(lambda m, *a: m.transp(*a), x, y, v)

    def projx(self, x: Point) -> Point:
        """The factors' projections."""
        return self._map(lambda m, p: m.projx(p), x)

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        size = sum(math.prod(s) for s in self._shapes().values())
        if len(shape) and shape[-1] == size:
            return True, None
        return False, f"'{name}' on the product needs the shape (..., {size}); got ({_text(shape)})"

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        for name, part in self._split(x)[0].items():
            ok, reason = self.factors[name].check_point_on_manifold(part, atol=atol, rtol=rtol, explain=True)
            if not ok:
                return False, f"factor {name!r}: {reason}"
        return True, None


def _same_names(names: Sequence[str], given: Mapping[str, Any], what: str) -> None:
    missing, unknown = [n for n in names if n not in given], [n for n in given if n not in names]
    if missing or unknown:
        have = ", ".join(f"{n} ({_text(getattr(v, 'shape', v))})" for n, v in given.items())
        problem = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise ValueError(f"{what} {problem}: the product has {', '.join(names)}; got {have}")


def _text(shape: Any) -> str:
    return ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
