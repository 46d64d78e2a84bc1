"""Cases that the laws of ``laws.py`` are tried on, built from a seed inside each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from manifolds import BuresWasserstein, Elementwise, FactorPair, FixedRank, Product, ScaleQuotient


@dataclass
class ManifoldCase:
    """A manifold, a point on it, and what the laws need to try it."""

    name: str
    manifold: object
    x: Tensor
    generator: torch.Generator
    invariant: Callable[[Tensor], Tensor]  # what the group leaves alone, on a batch of points
    algebra: Callable[[], object]  # a random element of the Lie algebra
    act: Callable[[Tensor], Tensor]  # one fixed linear isometry: on points and on tangent vectors
    control: Callable[[Tensor], Tensor]  # a linear map that is *not* an isometry
    definition: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # of the metric, if not ``inner``

    def metric(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The inner product by its definition."""
        return (self.definition or self.manifold.inner)(x, u, v)

    def ambient(self, x: Tensor | None = None, size: float = 0.3) -> Tensor:
        """A random ambient vector of that length at ``x``."""
        x = self.x if x is None else x
        u = torch.randn(x.shape, dtype=x.dtype, generator=self.generator)
        return size * u / self.manifold.norm(x, u, keepdim=True)

    def tangent(self, x: Tensor | None = None, size: float = 0.3) -> Tensor:
        """A random horizontal vector of that length at ``x``."""
        x = self.x if x is None else x
        u = self.manifold.proju(x, self.ambient(x))
        return size * u / self.manifold.norm(x, u, keepdim=True)

    def points(self, count: int) -> Tensor:
        """A batch of different points around ``x``."""
        x = self.x.repeat(count, *[1] * self.x.ndim)
        return self.manifold.expmap(x, self.tangent(x))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _rotation(generator: torch.Generator, size: int) -> Tensor:
    return torch.linalg.qr(_normal(generator, size, size)).Q


def _invertible(generator: torch.Generator, size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64) + 0.3 * _normal(generator, size, size)


def _elementwise(g: torch.Generator) -> ManifoldCase:
    scales, x = _normal(g, 5), _normal(g, 5)
    return ManifoldCase(
        "elementwise", Elementwise(), x, g,
        invariant=lambda x: x,
        algebra=lambda: _normal(g, 5),
        act=lambda x: x * scales,
        control=lambda x: x + 0.3 * x.roll(1, -1),
    )  # fmt: skip


def _scale(g: torch.Generator) -> ManifoldCase:
    rotation, skewed, x = _rotation(g, 5), _invertible(g, 5), _normal(g, 5)
    return ManifoldCase(
        "scale", ScaleQuotient(), x, g,
        invariant=lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
        algebra=lambda: _normal(g, 1),
        act=lambda x: 2.5 * (x @ rotation),
        control=lambda x: x @ skewed,
    )  # fmt: skip


def _bures(g: torch.Generator) -> ManifoldCase:
    rotation, skewed, x = _rotation(g, 3), _invertible(g, 3), _normal(g, 7, 3)
    generator = _normal(g, 3, 3)
    return ManifoldCase(
        "bures", BuresWasserstein(), x, g,
        invariant=lambda x: x @ x.mT,
        algebra=lambda: generator - generator.mT,
        act=lambda x: x @ rotation,
        control=lambda x: x @ skewed,
    )  # fmt: skip


def _factor_pair(metric: str) -> Callable[[torch.Generator], ManifoldCase]:
    def build(g: torch.Generator) -> ManifoldCase:
        manifold, gauge, skewed = FactorPair(7, metric), _invertible(g, 3), _invertible(g, 12)

        def definition(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
            m_g, m_h = (a.mT @ a for a in x.split((7, 5), dim=-2))
            p_g, p_h = (torch.linalg.inv(m_g), torch.linalg.inv(m_h)) if metric == "inv" else (m_h, m_g)
            (u_g, u_h), (v_g, v_h) = u.split((7, 5), dim=-2), v.split((7, 5), dim=-2)
            return (u_g @ p_g * v_g).sum((-2, -1)) + (u_h @ p_h * v_h).sum((-2, -1))

        return ManifoldCase(
            f"factor-{metric}", manifold, _normal(g, 12, 3), g,
            invariant=lambda x: x[..., :7, :] @ x[..., 7:, :].mT,
            algebra=lambda: _normal(g, 3, 3),
            act=lambda x: manifold.act(x, gauge),
            control=lambda x: skewed @ x,
            definition=definition,
        )  # fmt: skip

    return build


class _AlongGeodesics(FixedRank):
    """Steps along geodesics, as the laws expect: the retraction by truncation is tried in ``test_fixed_rank.py``."""

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """The exponential map."""
        return self.expmap(x, u)


def _fixed_rank(g: torch.Generator) -> ManifoldCase:
    gauge, skewed = _invertible(g, 3), _invertible(g, 12)

    def parts(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity of the matrix, and what it does not see, with dense projections."""
        (a, b), (u_a, u_b) = x.split((7, 5), dim=-2), u.split((7, 5), dim=-2)
        on_a, on_b = (c @ torch.linalg.inv(c.mT @ c) @ c.mT for c in (a, b))
        return u_a @ b.mT + a @ u_b.mT, on_a @ u_a @ b.mT - a @ u_b.mT @ on_b

    return ManifoldCase(
        "fixed-rank", _AlongGeodesics(3, rows=7), _normal(g, 12, 3), g,
        invariant=lambda x: x[..., :7, :] @ x[..., 7:, :].mT,
        algebra=lambda: _normal(g, 3, 3),
        act=lambda x: FactorPair(7).act(x, gauge),
        control=lambda x: skewed @ x,
        definition=lambda x, u, v: sum((a * b).sum((-2, -1)) for a, b in zip(parts(x, u), parts(x, v))),
    )  # fmt: skip


def _product(g: torch.Generator) -> ManifoldCase:
    parts = {"gain": _elementwise(g), "row": _scale(g), "factor.weight": _bures(g)}
    shapes = {name: tuple(case.x.shape) for name, case in parts.items()}
    product = Product({name: case.manifold for name, case in parts.items()}, shapes)

    def each(method: str) -> Callable[[Tensor], Tensor]:
        def apply(x: Tensor) -> Tensor:
            split = product.unpack_tensor(x)
            return product.pack_point({name: getattr(parts[name], method)(p) for name, p in split.items()})

        return apply

    def invariant(x: Tensor) -> Tensor:
        split = product.unpack_tensor(x)
        values = [case.invariant(split[name]).flatten(x.ndim - 1) for name, case in parts.items()]
        return torch.cat(values, dim=-1)

    return ManifoldCase(
        "product", product, product.pack_point({name: case.x for name, case in parts.items()}), g,
        invariant=invariant,
        algebra=lambda: {name: case.algebra() for name, case in parts.items()},
        act=each("act"),
        control=each("control"),
    )  # fmt: skip


_BUILDERS: dict[str, Callable[[torch.Generator], ManifoldCase]] = {
    "elementwise": _elementwise,
    "scale": _scale,
    "bures": _bures,
    "product": _product,
    "factor-inv": _factor_pair("inv"),
    "factor-mix": _factor_pair("mix"),
    "fixed-rank": _fixed_rank,
}
MANIFOLD_NAMES = tuple(_BUILDERS)


def manifold_case(name: str, seed: int = 0) -> ManifoldCase:
    """The case of that name, with everything random drawn from the seed."""
    return _BUILDERS[name](torch.Generator().manual_seed(seed))


def manifold_cases(seed: int = 0) -> Iterator[ManifoldCase]:
    """All cases."""
    return (manifold_case(name, seed) for name in MANIFOLD_NAMES)
