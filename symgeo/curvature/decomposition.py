"""Parameter space as a sum of irreducible representations: the isometry `encode`, and its inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from symgeo.curvature.assembly import Assembly, Bucket
from symgeo.curvature.leaves import Leaves
from symgeo.distributed import refuse_sharded
from symgeo.functional import Params
from symgeo.symmetry import Symmetry

#: rounding errors of a transform, relative to the norm of what it acts on, in units of eps
_ROUNDING = 8.0


class Decomposition:
    r"""Splits parameters into copies of irreducible representations of the compact groups of a symmetry.

    ``encode`` is an isometry of the parameters that are not frozen onto coordinates ``X_kind (M, D)`` on which an
    element g acts from the right, ``X -> X rho(g)^T``.  Every linear map that commutes with the group acts on each
    kind by an ``(M, M)`` matrix from the left (Schur's lemma), so that all linear algebra of such maps is done
    there.  Kinds of equal structure share a bucket, and blocks of equal shape and structure are transformed in one
    call, so that the cost in Python does not grow with the number of layers or heads.

    Translations (shifts) move points and leave tangent vectors alone, so that they need no average.  Frozen
    parameters are constants: they are in no bucket, and come back as zeros.

    Parameters
    ----------
    params: give shapes and order; compact: average non-compact groups over their maximal compact subgroups

    Attributes
    ----------
    buckets: in the order of all lists of coordinates here; the trivial kind, if there is one, comes first

    Raises ``SymmetryError`` (a ``ValueError``) that names the group, and the parameter where there is one, for
    groups without an average and for structures that are not covered: three axes of one group on one parameter,
    and two axes with more than one orthogonal group (or sign) inside each index.

    >>> from symgeo.groups import Permutation
    >>> mlp = Symmetry({"up": "h _", "down": "_ h*"}, {"h": Permutation()})
    >>> params = {"up": torch.randn(5, 3), "down": torch.randn(2, 5)}
    >>> [(b.kinds, b.copies, b.dimension) for b in Decomposition(mlp, params).buckets]
    [(((),), 5, 1), (((('h', 'W'),),), 5, 4)]
    """

    def __init__(self, symmetry: Symmetry, params: Mapping[str, Tensor], compact: bool = False) -> None:
        self.symmetry, self.compact = symmetry, compact
        self.shapes = {name: tuple(x.shape) for name, x in params.items()}
        self.device = next((x.device for x in params.values()), torch.device("cpu"))
        self._leaves = Leaves(symmetry.bind(params), compact)
        self._assembly = Assembly(self._leaves, self.device)
        self.buckets: tuple[Bucket, ...] = self._assembly.buckets

    @property
    def trivial(self) -> int | None:
        """The number of the trivial bucket, or None."""
        return 0 if self.buckets and self.buckets[0].trivial else None

    @property
    def size(self) -> int:
        """The number of entries of all parameters, frozen ones included."""
        return sum(prod(shape) for shape in self.shapes.values())

    def encode(self, params: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """The coordinates of every bucket, (K, B, M, D).

        In `dtype`, by default that of the parameters, at least single precision; complex where a bucket is.
        They may be views of the parameters.  Nothing is read back from the device.
        Raises ValueError for a missing or unknown parameter, or another shape.
        """
        self.check(params)
        stacks = self._leaves.gather(params, dtype or self._dtype(params))
        return self._assembly.select(
            [collection.plan.forward(stack) for collection, stack in zip(self._leaves.collections, stacks)]
        )

    def decode(self, coordinates: Sequence[Tensor]) -> dict[str, Tensor]:
        """The inverse of `encode`: every parameter that is not frozen, in the precision of the coordinates."""
        parts = zip(self._leaves.collections, self._assembly.scatter(coordinates))
        return self._leaves.scatter([collection.plan.inverse(pieces) for collection, pieces in parts])

    def spread(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """The diagonal, in parameter space, of the operator sum_c t_c P_c, P_c the projection on copy c.

        values: t, real (K, B, M) for every bucket.
        """
        parts = zip(self._leaves.collections, self._assembly.scatter(values))
        return self._leaves.scatter([collection.plan.spread(pieces) for collection, pieces in parts])

    def clean(self, coordinates: Sequence[Tensor], params: Mapping[str, Tensor]) -> list[Tensor]:
        """The coordinates of params, with 0 for what is nothing but the rounding error of the transforms.

        A centred part of equal entries is such; a pseudo-inverse would blow it up.
        """
        if not coordinates:
            return []
        dtype = torch.empty(0, dtype=coordinates[0].dtype).real.dtype
        level = (_ROUNDING * torch.finfo(dtype).eps) ** 2
        energies = [
            stack.flatten(1).square().sum(-1) * (0.0 if collection.plan.exact else level)
            for collection, stack in zip(self._leaves.collections, self._leaves.gather(params, dtype))
        ]
        result = []
        for bucket, noise, x in zip(self.buckets, self._assembly.totals(energies), coordinates):
            size = x.abs().square()
            found = size if bucket.trivial else size.sum((-2, -1), keepdim=True)
            result.append(torch.where(found <= noise, torch.zeros_like(x), x))
        return result

    def check(self, params: Mapping[str, Tensor], what: str = "params") -> None:
        """Raises ValueError unless every parameter that is not frozen is there whole with its shape, and no other."""
        refuse_sharded(params, "gather them with full_tensor(), as SymO does")
        for name, x in params.items():
            if name not in self.shapes:
                raise ValueError(f"{what}: {name!r} is not among the parameters {', '.join(self.shapes)}")
            if tuple(x.shape) != self.shapes[name]:
                raise ValueError(f"{what}: {name!r} must have shape {self.shapes[name]}; got {tuple(x.shape)}")
        for name, shape in self._leaves.shapes.items():
            if name not in params:
                raise ValueError(f"{what}: parameter {name!r} of shape {shape} is missing")

    def restore(self, moved: Mapping[str, Tensor], like: Params) -> Params:
        """The tensors in the order, dtypes and names of `like`; zeros for frozen parameters."""
        return {
            name: moved[name].to(x.dtype) if name in moved else torch.zeros_like(x) for name, x in like.items()
        }

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """One vector in flat order."""
        return torch.cat([params[name].reshape(-1) for name in self.shapes])

    def unflatten(self, x: Tensor) -> Params:
        """The inverse of `flatten`."""
        pieces = x.split([prod(shape) for shape in self.shapes.values()])
        return {name: piece.reshape(shape) for (name, shape), piece in zip(self.shapes.items(), pieces)}

    def same(self, other: Decomposition) -> bool:
        """Whether both are the same split of the same parameters, in the same order."""
        return self is other or (
            list(self.shapes.items()) == list(other.shapes.items()) and self.buckets == other.buckets
        )

    def _dtype(self, params: Mapping[str, Tensor]) -> torch.dtype:
        dtype = torch.float32
        for name in self._leaves.shapes:
            dtype = torch.promote_types(dtype, params[name].dtype)
        return dtype
