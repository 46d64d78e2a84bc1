"""Tensors of whole buckets whose parts live in the state of single parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from symgeo.curvature import Bucket
from symgeo.optim.packed import pack, unpack

State = Mapping[Tensor, dict[str, Any]]


class Stack:
    """One real or complex tensor (K, ...) for the K kinds of a bucket.

    The slice of each kind is the entry ``key`` in the state of the first parameter that carries it, and the number
    of steps that it has seen the entry ``key + " steps"``: state dictionaries, copies and checkpoints hold ordinary
    tensors under the parameters.  Of a trivial kind of which only the diagonal is kept every parameter has its own
    copies, so that what lies where does not depend on which parameters are together.  The slices are views of one
    tensor, which is put together again after a state has been loaded or copied.  Complex entries are stored as pairs
    of real numbers, Hermitian matrices, where `hermitian` was called, as their upper triangles.

    Parameters
    ----------
    what: the first word of the keys; members: the parameters by name
    shape: of the slice of one kind, (B, M) if that is a diagonal; complex: whether its entries are; dtype: real
    """

    def __init__(
        self, what: str, bucket: Bucket, members: Mapping[str, Tensor], shape: tuple[int, ...], complex: bool,
        dtype: torch.dtype,
    ) -> None:
        self.keys = [f"{what} {kind_name(kind)}" for kind in bucket.kinds]
        self.owners = [members[rows[0][0]] for rows in bucket.rows]
        self._lengths: list[int] | None = None  # of the copies of every parameter, where they are kept apart
        if bucket.trivial and len(shape) == 2:
            rows = bucket.rows[0]
            self.owners, self._lengths = [members[name] for name, *_ in rows], [m for *_, m in rows]
            self.keys = [f"{what} trivial" + (f" {index}" if index else "") for _, index, _ in rows]
        self._complex, self._shape = complex, shape
        self._size: int | None = None  # of matrices that are packed
        self._dtype = dtype
        self._tensor: Tensor | None = None
        self._views: list[Tensor] = []

    def hermitian(self) -> Stack:
        """The same, before its first use, for Hermitian matrices (B, M, M): M (M + 1) / 2 numbers for each."""
        if len(self._shape) == 3:
            batch, self._size, _ = self._shape
            self._shape = (batch, self._size * (self._size + 1) // 2)
        return self

    def read(self, state: State) -> Tensor:
        """The tensor (K, ...); zeros for kinds that are new, whose steps are 0.  A copy where it is packed."""
        stored = self.stored(state)
        return stored if self._size is None else unpack(stored, self._size)

    def stored(self, state: State) -> Tensor:
        """What is in the state, to be changed in place: the tensor (K, ...), or upper triangles where it is packed."""
        found = [state[p].get(key) for p, key in zip(self.owners, self.keys)]
        if self._tensor is None or any(a is not b for a, b in zip(found, self._views)):
            self._link(state, found)
        assert self._tensor is not None
        return torch.view_as_complex(self._tensor) if self._complex else self._tensor

    def write(self, state: State, values: Tensor) -> None:
        """Replace all entries."""
        self.stored(state).copy_(values if self._size is None else pack(values))

    def steps(self, state: State) -> list[int]:
        """How many steps each kind has seen, or each parameter where they are kept apart."""
        return [state.get(p, {}).get(f"{key} steps", 0) for p, key in zip(self.owners, self.keys)]

    def count(self, state: State) -> None:
        """One step more for each."""
        for p, key, steps in zip(self.owners, self.keys, self.steps(state)):
            state[p][f"{key} steps"] = steps + 1

    def _link(self, state: State, found: list[Tensor | None]) -> None:
        shape = (*self._shape, 2) if self._complex else self._shape
        kinds = len(found) if self._lengths is None else 1
        self._tensor = torch.zeros(kinds, *shape, dtype=self._dtype, device=self.owners[0].device)
        apart = None if self._lengths is None else self._tensor[0].split(self._lengths, dim=-1)
        self._views = list(self._tensor.unbind() if apart is None else apart)
        for p, key, view, old in zip(self.owners, self.keys, self._views, found):
            if old is not None and old.shape == view.shape:
                view.copy_(old)
            else:
                state[p].pop(f"{key} steps", None)
            state[p][key] = view


def kind_name(kind: tuple[tuple[str, str], ...]) -> str:
    """A kind in words.

    >>> kind_name((("h", "W"), ("g", "V")))
    'h:W g:V'
    """
    return " ".join(f"{group}:{label}" for group, label in kind) or "trivial"
