"""The kinds of one symmetry as an optimizer sees them: coordinates, what is kept of each kind, and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from symgeo.curvature import Bucket, Decomposition
from symgeo.functional import Params
from symgeo.optim.statistics import Factor, is_diagonal, moment_shape, spread_over
from symgeo.optim.storage import Stack


class Space:
    """A decomposition together with the parameters whose states hold its statistics.

    Parameters
    ----------
    number: of the symmetry, or None if there is only one; it becomes part of the keys
    members: the parameters by name
    trivial: the policy for the trivial kind
    decays: the name of a parameter -> its betas[1] at present
    dtype: of statistics, real

    Attributes
    ----------
    diagonal: for each bucket whether only diagonals are kept; dtype
    """

    def __init__(
        self, number: int | None, decomposition: Decomposition, members: Mapping[str, Tensor], trivial: str,
        decays: Callable[[str], float], dtype: torch.dtype,
    ) -> None:
        self.decomposition, self._members, self._decays = decomposition, members, decays
        self._suffix = "" if number is None else f" {number}"
        self.diagonal = [is_diagonal(bucket, trivial) for bucket in decomposition.buckets]
        self.dtype = dtype
        self._like = torch.empty(0, dtype=dtype, device=decomposition.device)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Those of the decomposition."""
        return self.decomposition.buckets

    def encode(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Coordinates (K, B, M, D) in the precision of the statistics."""
        return self.decomposition.encode(tensors, self.dtype)

    def decode(self, xs: Sequence[Tensor]) -> Params:
        """The tensors of coordinates."""
        return self.decomposition.decode(xs)

    def stacks(self, what: str) -> list[Stack]:
        """A place in the state for one (B, M, M) or (B, M) for each kind."""
        return [
            Stack(f"{what}{self._suffix}", bucket, self._members, moment_shape(bucket, diagonal),
                  bucket.complex and not diagonal, self.dtype)
            for bucket, diagonal in zip(self.buckets, self.diagonal)
        ]

    def decay(self, i: int) -> Factor:
        """betas[1] as a factor of the second moments of bucket i."""
        bucket = self.buckets[i]
        values = [[self._decays(name) for name, *_ in rows] for rows in bucket.rows]
        return spread_over(bucket, values, self.diagonal[i], self._like)

    def per_kind(self, i: int, values: Sequence[int]) -> Factor:
        """One number for each kind of bucket i, or for each row of its only one, as such a factor."""
        bucket = self.buckets[i]
        rows = [[float(value)] * len(row) for value, row in zip(values, bucket.rows)]
        if bucket.trivial and len(values) == len(bucket.rows[0]):
            rows = [[float(value) for value in values]]
        return spread_over(self.buckets[i], rows, self.diagonal[i], self._like)
