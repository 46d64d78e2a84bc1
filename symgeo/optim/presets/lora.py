"""The preset of low-rank adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from symgeo.errors import SymmetryError
from symgeo.groups import GeneralLinear, Group, SignFlip
from symgeo.optim.presets.selection import selected
from symgeo.symmetry import Symmetry

_FACTOR = re.compile(r"^(.*\.)?(lora_(?:embedding_)?)([AB])((?:\.|$).*)")


def lora(model: nn.Module, exclude: Iterable[str | nn.Module] = ()) -> Symmetry:
    r"""The basis of the rank axis of every adapter B A: GeneralLinear, and SignFlip on the two long axes.

    SymO needs ``compact=True``.  In the balanced gauge, ``B^T B = A A^T``, every row of B (m, r) and every column of
    A (r, n) has one second moment, the mean square of its r entries: m + n numbers, as adaptive as Adam, and a
    trajectory of B A that does not depend on how the product was split into factors, also from B = 0.
    The basis of the rank axis is an exact symmetry of the loss; SignFlip on the long axes is coarser than one.

    Adapters are parameters that peft names ``...lora_A...`` and ``...lora_B...`` (or ``lora_embedding_A``, ``_B``);
    all others, such as magnitudes, are left to AdamW.  Pairs of which a factor is frozen or excluded (names or
    modules) are left out.  Raises SymmetryError where there is no pair.

    >>> layer = nn.ModuleDict({"lora_A": nn.Linear(5, 2, bias=False), "lora_B": nn.Linear(2, 3, bias=False)})
    >>> lora(layer).tensors
    {'lora_B.weight': 'm[lora_B.weight] r[lora_B.weight]', 'lora_A.weight': 'r[lora_B.weight]* n[lora_B.weight]'}
    """
    params = selected(model, exclude)
    tensors: dict[str, str] = {}
    groups: dict[str, Group] = {}
    for name in params:
        match = _FACTOR.match(name)
        if match is None or match[3] != "B":
            continue
        other = f"{match[1] or ''}{match[2]}A{match[4]}"
        if other not in params or params[name].dim() < 2 or params[other].dim() < 2:
            continue
        rank, long, wide = (f"{letter}[{name}]" for letter in "rmn")
        tensors[name] = f"{long} {rank}" + " _" * (params[name].dim() - 2)
        tensors[other] = f"{rank}* {wide}" + " _" * (params[other].dim() - 2)
        groups |= {rank: GeneralLinear(), long: SignFlip(), wide: SignFlip()}
    if not tensors:
        raise SymmetryError(
            f"lora: found no pair of trainable parameters named lora_A and lora_B in {type(model).__name__}; declare"
            " the factors with symgeo.Symmetry"
        )
    return Symmetry(tensors, groups)
