"""Parameters + symmetry + metric -> a Riemannian manifold over dicts of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from manifolds import Elementwise, FactorPair, Product
from manifolds.flat import Flat
from manifolds.frame import METRICS
from symgeo.chart import Chart
from symgeo.distributed import refuse_sharded
from symgeo.functional import Params
from symgeo.pairs import PairLayout
from symgeo.symmetry import Symmetry

#: what to do instead with parameters that are spread over processes
_WHOLE = "gather them with full_tensor(), or measure the module with symgeo.in_place_sharpness"

RESTS = {"adaptive": Elementwise, "euclidean": Flat}


class ParameterManifold:
    r"""The parameters of a model modulo the GL, rotary and LoRA groups of a symmetry.

    Every pair of factors ``(G, H) ~ (G A^-1, H A^H)`` carries ``metric`` ("inv" or "mix", see
    :class:`manifolds.FactorPair`), every other parameter ``rest``: "adaptive" is ``sum_i u_i v_i / w_i^2``,
    "euclidean" is ``sum_i u_i v_i``.  The inner product is the sum over all of them,

        <u, v> = sum_pairs <u_p, v_p>_metric + sum_i u_i v_i / w_i^2,

    (Hide & Seek, arXiv 2505.05409, section 4).  All pairs of one shape are one batch.  Without a symmetry
    nothing is quotiented.  ``eps`` relaxes the pair metrics covariantly.

    The tangent space is the horizontal space: what is orthogonal to the group orbits.  Parameters that are
    exactly zero have no adaptive metric: they are left out (their tangent entries are 0).  So are parameters that
    the symmetry calls frozen: they are constants.

    Methods take any ``Params`` of the same names and shapes.  Raises ``ValueError`` (``SymmetryError`` for the
    declaration) that names the parameter, what was needed and what was found.

    >>> from symgeo.groups import GeneralLinear
    >>> lora = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})
    >>> params = {"B": torch.ones(3, 1), "A": torch.full((1, 4), 2.0)}
    >>> manifold = ParameterManifold(params, lora)
    >>> float(manifold.inner(params, params, params))  # horizontal or not: |B|^2/|B|^2 + |A|^2/|A|^2
    2.0
    """

    def __init__(self, params: Params, symmetry: Symmetry | None = None, metric: str = "inv",
                 rest: str = "adaptive", eps: float = 0.0):
        if metric not in METRICS:
            raise ValueError(f"ParameterManifold: metric must be one of {', '.join(METRICS)}; got {metric!r}")
        if rest not in RESTS:
            raise ValueError(f"ParameterManifold: rest must be one of {', '.join(RESTS)}; got {rest!r}")
        _check_floating(params)
        self.symmetry, self.metric, self.rest, self.eps = symmetry, metric, rest, eps
        self.shapes = {name: tuple(p.shape) for name, p in params.items()}
        self.layout = PairLayout(params, symmetry.bind(params) if symmetry else None)
        self.pairs = {name: FactorPair(rows, metric, eps) for name, rows in self.layout.rows.items()}
        self.product = Product({"rest": RESTS[rest](), **self.pairs})

    def pack(self, params: Mapping[str, Tensor], what: str = "params") -> dict[str, Tensor]:
        """A dict of parameters (or a tangent vector) as one flat vector and batches of stacked pairs."""
        refuse_sharded(params, _WHOLE)
        for name, shape in self.shapes.items():
            if name not in params:
                raise ValueError(f"{what}: parameter {name!r} of shape {shape} is missing")
            if tuple(params[name].shape) != shape:
                raise ValueError(f"{what}: {name!r} must have shape {shape}; got {tuple(params[name].shape)}")
        unknown = [name for name in params if name not in self.shapes]
        if unknown:
            raise ValueError(f"{what}: {unknown[0]!r} is not a parameter of this manifold")
        return self.layout.pack(params)

    def unpack(self, packed: Mapping[str, Tensor], like: Params) -> Params:
        """The inverse of :meth:`pack`, in the dtypes of ``like``, which also gives the frozen parameters."""
        moved = self.layout.unpack(packed)
        return {name: moved[name].to(p.dtype) if name in moved else p for name, p in like.items()}

    def _vector(self, packed: Mapping[str, Tensor], params: Params) -> Params:
        """A packed tangent vector as Params, zero for frozen parameters."""
        frozen = {name: torch.zeros_like(p) for name, p in params.items() if name not in self.layout.shapes}
        return self.unpack(packed, {**params, **frozen})

    def inner(self, params: Params, u: Params, v: Params) -> Tensor:
        """``<u, v>`` at ``params``, a scalar."""
        return self.product.inner(self.pack(params), self.pack(u, "u"), self.pack(v, "v"))

    def norm(self, params: Params, u: Params) -> Tensor:
        """``sqrt(<u, u>)``, a scalar."""
        return self.inner(params, u, u).clamp_min(0).sqrt()

    def horizontal(self, params: Params, u: Params) -> Params:
        """The metric-orthogonal projection of ``u`` onto the horizontal space."""
        return self._vector(self.product.proju(self.pack(params), self.pack(u, "u")), params)

    def rgrad(self, params: Params, egrad: Params) -> Params:
        """The horizontal Riemannian gradient: ``<rgrad, u> = sum egrad u`` for every horizontal ``u``."""
        return self._vector(self.product.egrad2rgrad(self.pack(params), self.pack(egrad, "egrad")), params)

    def christoffel(self, params: Params, u: Params) -> Params:
        """Gamma(u, u), with ``c'' = -Gamma(c', c')`` along geodesics."""
        return self._vector(self.product.christoffel(self.pack(params), self.pack(u, "u")), params)

    def geodesic(self, params: Params, u: Params, method: str = "exact") -> Callable[[float | Tensor], Params]:
        """The curve ``t -> Params`` from ``params`` with velocity ``u``: "exact", "taylor2" or "linear".

        Raises ``ValueError`` from the curve where a mix geodesic leaves the domain of its metric.
        """
        curve = self.product.geodesic(self.pack(params), self.pack(u, "u"), method)
        return lambda t: self.unpack(curve(t), params)

    def random_tangent(self, params: Params, generator: torch.Generator | None = None) -> Params:
        """A horizontal vector, standard normal in metric-orthonormal coordinates."""
        chart = self.chart(params)
        return chart.tangent(chart.random(generator))

    def chart(self, params: Params) -> Chart:
        """Metric-orthonormal coordinates at ``params``, in the balanced gauge: for search and for Hessians."""
        params = {name: p.detach() for name, p in params.items()}
        packed = self.pack(params)
        frames = {name: pair.frame(packed[name]) for name, pair in self.pairs.items()}
        return Chart(self.layout, params, self.rest == "adaptive", frames)


def _check_floating(params: Mapping[str, Tensor]) -> None:
    if not params:
        raise ValueError("params: needed at least one parameter; the dict is empty")
    refuse_sharded(params, _WHOLE)
    for name, tensor in params.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"params: {name!r} must be a floating-point tensor; got {kind}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"params: {name!r} has entries that are not finite")
