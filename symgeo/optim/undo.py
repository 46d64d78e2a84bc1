"""A step that fails is no step: what it has changed of the state goes back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Entry = dict[str, Any]


@contextmanager
def undone(state: MutableMapping[Tensor, Entry], params: Iterable[Tensor], but: Collection[str]) -> Iterator[None]:
    """A context that leaves the state of these parameters as it was where the body raises.

    It copies all entries but those named in `but`, which the body must not change; entries that are views of one
    tensor in one go.
    """
    owned = list(params)
    before = {p: dict(state[p]) for p in owned if p in state}
    tensors = [value for entry in before.values() for key, value in entry.items()
               if key not in but and isinstance(value, Tensor)]
    whole = list({id(base): base for base in (x if x._base is None else x._base for x in tensors)}.values())
    copies = torch._foreach_mul(whole, 1.0) if whole else []
    try:
        yield
    except BaseException:
        for base, copy in zip(whole, copies):
            base.copy_(copy)
        for p in owned:
            if p in before:
                state[p].clear()
                state[p].update(before[p])
            else:
                state.pop(p, None)
        raise
