"""Averages over the orbit of a vector: its mean (R1) and its second moment (R2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from symgeo.curvature.decomposition import Decomposition
from symgeo.curvature.dense import DenseBlock
from symgeo.curvature.operator import InvariantOperator
from symgeo.curvature.structured import Block, StructuredBlock
from symgeo.functional import Params
from symgeo.symmetry import Symmetry


def decompose(
    symmetry: Symmetry | Decomposition, params: Mapping[str, Tensor], compact: bool = False
) -> Decomposition:
    """The decomposition of a symmetry at these shapes; one that exists already is used as it is."""
    return symmetry if isinstance(symmetry, Decomposition) else Decomposition(symmetry, params, compact)


def coordinates(decomposition: Decomposition, u: Mapping[str, Tensor], what: str) -> list[Tensor]:
    """The coordinates of u in double precision, without rounding errors that pose as data.

    Raises ValueError naming the tensor if an entry is not finite.
    """
    decomposition.check(u, what)
    for name, x in u.items():
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{what}: {name!r} has entries that are not finite")
    u = {name: x.detach() for name, x in u.items()}
    return decomposition.clean(decomposition.encode(u, torch.float64), u)


def outer(
    decomposition: Decomposition, xs: list[Tensor], ys: list[Tensor] | None = None, trivial: Block | None = None
) -> InvariantOperator:
    """R2 in coordinates: T = X Y^H / d for every bucket, or another block for the trivial kind."""
    blocks: list[Block] = []
    for i, (bucket, x) in enumerate(zip(decomposition.buckets, xs)):
        y = x if ys is None else ys[i]
        if bucket.trivial:
            x, y = x[0, 0], y[0, 0]
            blocks.append(trivial or StructuredBlock.outer(x, x if ys is None else y))
        elif ys is None:
            blocks.append(DenseBlock.outer(x / bucket.dimension**0.5))
        else:
            blocks.append(DenseBlock(bucket.gram(x, y)))
    return InvariantOperator(decomposition, blocks)


def orbit_mean(symmetry: Symmetry | Decomposition, u: Mapping[str, Tensor], compact: bool = False) -> Params:
    """R1(u) = E_A[A u], the mean over the orbit of a vector: its trivial part.

    Source: arXiv 2606.00442, Eq. 1.  Every group is averaged with its uniform (Haar) measure.  u is a tangent
    vector or gradient: translations leave it alone.  Frozen parameters give zeros.
    Raises SymmetryError (see `Decomposition`) for a non-compact group unless compact=True, which averages over
    its maximal compact subgroup.

    >>> from symgeo.groups import Permutation
    >>> bias = Symmetry({"b": "h"}, {"h": Permutation()})
    >>> orbit_mean(bias, {"b": torch.tensor([1.0, 2.0, 6.0])})
    {'b': tensor([3., 3., 3.])}
    """
    decomposition = decompose(symmetry, u, compact)
    decomposition.check(u, "u")
    xs = decomposition.encode(u, torch.float64)
    kept = [x if bucket.trivial else torch.zeros_like(x) for bucket, x in zip(decomposition.buckets, xs)]
    return decomposition.restore(decomposition.decode(kept), dict(u))


def orbit_average(
    symmetry: Symmetry | Decomposition,
    u: Mapping[str, Tensor],
    v: Mapping[str, Tensor] | None = None,
    compact: bool = False,
) -> InvariantOperator:
    """R2(u, v) = E_A[(A u)(A v)^T], v = u if None: the orthogonal projection of u v^T on invariant operators.

    Source: arXiv 2606.00442, Eq. 2.  Exact, at the cost of one transform and one Gram matrix for each kind of
    representation (the isotypic form is derived here).  With v other than u the operator is not symmetric.
    compact and errors as in `orbit_mean`.

    >>> from symgeo.groups import SignFlip
    >>> bias = Symmetry({"b": "h"}, {"h": SignFlip()})
    >>> orbit_average(bias, {"b": torch.tensor([1.0, 2.0])}).dense()
    tensor([[1., 0.],
            [0., 4.]], dtype=torch.float64)
    """
    decomposition = decompose(symmetry, u, compact)
    xs = coordinates(decomposition, u, "u")
    return outer(decomposition, xs, None if v is None else coordinates(decomposition, v, "v"))
