"""What a softmax over the logits does not see of the head in front of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from symgeo.errors import SymmetryError
from symgeo.functional import Params
from symgeo.models.families import FAMILIES
from symgeo.models.find import try_on
from symgeo.models.probe import inputs
from symgeo.models.stack import Names, reading_heads
from symgeo.models.structure import Linear
from symgeo.symmetry import Symmetry
from symgeo.symmetry.check import Function


def logit_symmetry(model: nn.Module) -> Symmetry:
    """The translations of a head that leave every probability alone, though not the logits:

        W += 1 c^T,   b += c_0 1,     softmax(W x + b) unchanged

    so that ``find_symmetry(model) | logit_symmetry(model)`` is the symmetry of a cross-entropy loss.  Exact where the
    head has its weights to itself and nothing bends the logits (a cap); tried on the model.

    Raises ``SymmetryError`` where no known head has it.

    >>> from symgeo.models.tiny_lm import TinyLM
    >>> logit_symmetry(TinyLM()).shifts
    {'logits': {'head.weight': '1 _', 'head.bias': '1'}}
    """
    call = inputs(model, torch.Generator().manual_seed(0))
    heads = list(_heads(model)) if call is not None else []
    for head in heads:
        pattern = {head.weight: "_ 1" if head.transposed else "1 _"} | ({head.bias: "1"} if head.bias else {})
        shift = Symmetry({}, {}, shifts={"logits": pattern})
        if call is not None and try_on(shift, model, call, None, _probabilities).ok:
            frozen = {name for name in pattern if not model.get_parameter(name).requires_grad}
            return Symmetry({}, {}, shifts=shift.shifts, frozen=frozen)
    raise SymmetryError(
        f"logit_symmetry: {type(model).__name__} has no head whose translation softmax does not see"
        f"{' (tried ' + ', '.join(head.weight for head in heads) + ')' if heads else ''}: none is known, it shares its "
        "weights with embeddings, or the logits are capped"
    )


def _heads(model: nn.Module) -> Iterator[Linear]:
    names = Names(model)
    seen: set[str] = set()
    for family in FAMILIES:
        for _, head in reading_heads(model, family):
            if names.free(head) and head.weight not in seen:
                seen.add(head.weight)
                yield head


def _probabilities(f: Function) -> Function:
    def g(params: Params) -> tuple[Tensor, ...]:
        outputs = f(params)
        return tuple(x.log_softmax(-1) for x in ((outputs,) if isinstance(outputs, Tensor) else outputs))

    return g

