"""Restriction of an operator to some of the parameters."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from glob import escape

import torch
from torch import Tensor

from symgeo.hessian.operator import HessianOperator
from symgeo.hessian.space import FlatSpace


def block(operator: HessianOperator, *patterns: str) -> HessianOperator:
    """The diagonal block ``E^T S E`` of the parameters whose names match one of the patterns, e.g. "layers.0.*".

    Raises ``ValueError`` for a pattern that matches nothing, and for operators in other than parameter coordinates.
    """
    space = operator.parameters
    if not patterns:
        raise ValueError(f"block: needed the names of parameters, or patterns; there are {', '.join(space.shapes)}")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in space.shapes):
            raise ValueError(f"block: no parameter is called {pattern!r}; there are {', '.join(space.shapes)}")
    names = [name for name in space.shapes if any(fnmatchcase(name, pattern) for pattern in patterns)]
    whole = space.tangent(space.point)
    part, rows = FlatSpace({name: whole[name] for name in names}), space.columns(names)

    def product(v: Tensor) -> Tensor:
        embedded = torch.zeros(space.size, v.shape[1], dtype=v.dtype, device=v.device)
        return operator.product(embedded.index_copy(0, rows, v)).index_select(0, rows)

    return HessianOperator(product, part, f"{operator.name} of {', '.join(patterns)}", operator.chunk)


def module_blocks(operator: HessianOperator, modules: Iterable[str] | None = None) -> dict[str, HessianOperator]:
    """The diagonal block of each module, by name.

    By default of what every module owns itself, so that the blocks share nothing: a module is what stands before the
    last dot of a parameter's name.  A name that is given covers everything below it.
    """
    names = operator.parameters.shapes
    result: dict[str, HessianOperator] = {}
    if modules is None:
        owned: dict[str, list[str]] = {}
        for name in names:
            owned.setdefault(name.rpartition(".")[0] or name, []).append(escape(name))
        return {module: block(operator, *mine) for module, mine in owned.items()}
    for module in modules:
        patterns = [p for p in (module, f"{module}.*") if any(fnmatchcase(name, p) for name in names)]
        result[module] = block(operator, *(patterns or [module]))
    return result
