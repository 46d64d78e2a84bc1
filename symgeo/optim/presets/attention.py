"""The preset of attention heads."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import or_

from torch import nn

from symgeo.errors import SymmetryError
from symgeo.models.generators import branch_symmetry
from symgeo.models.recognise import recognise
from symgeo.models.structure import Attention
from symgeo.optim.presets.selection import excluded
from symgeo.symmetry import Symmetry


def attention(model: nn.Module, exclude: Iterable[str | nn.Module] = ()) -> Symmetry:
    r"""The bases of all heads, and their order: GL per head on query-key and on value-output, permutations of heads.

    SymO needs ``compact=True``: in the balanced gauge the rotations of all heads and their order make the merged axis
    (heads, coordinates) one irreducible axis, so that the statistics of a layer of width d are two matrices, of
    2 d + 2 (queries, keys and their biases) and 2 d + 1 rows (values, bias, outputs), whatever the number of heads.
    Every group here is an exact symmetry of the loss.  Rotary positions leave the scaled rotations of their planes.

    Layers are those that `symgeo.find_symmetry` knows; one of which a parameter is excluded (names or modules) or
    frozen is left out.  Raises SymmetryError where there is none.

    >>> from symgeo.models.tiny_lm import TinyLM
    >>> attention(TinyLM(depth=1)).tensors["blocks.0.attention.key.weight"]
    '(H[blocks.0] e[blocks.0]) _'
    """
    params = dict(model.named_parameters())
    out = excluded(model, exclude)
    parts = []
    for found in recognise(model):
        for branch in found.layer.branches:
            if not isinstance(branch.core, Attention):
                continue
            part = branch_symmetry(branch)
            part = Symmetry(part.tensors, part.groups, part.sizes)
            part = part.each(found.prefix.removesuffix(".")) if found.prefix else part
            if all(params[name].requires_grad and id(params[name]) not in out for name in part.tensors):
                parts.append(part)
    if not parts:
        raise SymmetryError(
            f"attention: found no trainable attention layer of a known family in {type(model).__name__}; declare its"
            " symmetry with symgeo.Symmetry"
        )
    return reduce(or_, parts)
