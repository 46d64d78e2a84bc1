"""Gains and biases of norms folded into the maps that read them, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn

from symgeo.errors import SymmetryError
from symgeo.functional import Params
from symgeo.models.compensated import by_norm, readers_of
from symgeo.models.recognise import recognise
from symgeo.models.stack import stacks
from symgeo.models.structure import Linear, Norm
from symgeo.symmetry import Reader


@dataclass(frozen=True)
class Fold:
    """A norm with all maps that read it, and nothing else does; with full names."""

    norm: Norm
    linears: tuple[Linear, ...]
    readers: tuple[Reader, ...]

    def apply(self, params: Params) -> Params:
        """``W <- W diag(g)``, ``b <- b + W beta`` (or ``beta <- beta / g`` where a map has no bias), ``g <- 1``."""
        gain, norm = params[self.norm.weight] + self.norm.offset, self.norm
        moved = {norm.weight: torch.full_like(gain, 1.0 - norm.offset)}
        if norm.bias:
            moved |= self._folded_bias(params, gain)
        for linear in self.linears:
            axis = linear.read()
            x = moved.get(axis.parameter, params[axis.parameter])
            moved[axis.parameter] = axis.mapped(x, lambda x: x * gain)
        return moved

    def _folded_bias(self, params: Params, gain: Tensor) -> Params:
        assert self.norm.bias is not None
        shift = params[self.norm.bias]
        if not self._absorbed:
            return {self.norm.bias: torch.where(gain == 0, shift, shift / torch.where(gain == 0, 1.0, gain))}
        moved: Params = {self.norm.bias: torch.zeros_like(shift)}
        for reader in self.readers:
            for name, step in reader.takes_back(reader.product(shift, params), params).items():
                moved[name] = moved.get(name, params[name]) - step
        return moved

    @property
    def _absorbed(self) -> bool:
        return bool(self.readers) and all(reader.bias is not None for reader in self.readers)

    def undo(self, params: Params, original: Params) -> Params:
        """The inverse, with the gain and bias that the norm had; columns behind a gain of zero come back too."""
        gain, norm = original[self.norm.weight] + self.norm.offset, self.norm
        moved = {norm.weight: original[norm.weight].clone()}
        for linear in self.linears:
            axis = linear.read()
            x, old = (p.movedim(axis.index, -1) for p in (moved.get(axis.parameter, params[axis.parameter]),
                                                         original[axis.parameter]))
            back = axis.mapped(x.movedim(-1, axis.index), lambda x: x / torch.where(gain == 0, 1.0, gain))
            kept = torch.where(gain == 0, old, back.movedim(axis.index, -1)).movedim(-1, axis.index)
            moved[axis.parameter] = kept
        if norm.bias and self._absorbed:
            moved[norm.bias] = original[norm.bias].clone()
            for reader in self.readers:
                after = {**params, **moved}
                for name, step in reader.takes_back(reader.product(original[norm.bias], after), params).items():
                    moved[name] = moved.get(name, params[name]) + step
        elif norm.bias:
            moved[norm.bias] = torch.where(gain == 0, params[norm.bias], params[norm.bias] * gain)
        return moved


class Unfold:
    """The inverse of :func:`fold_norms`: gives a folded model, or its parameters (trained further or not), the gains
    and biases of norms back that the original had.

    folds : the norms that were folded, with the maps that read them
    """

    def __init__(self, folds: tuple[Fold, ...], original: Params):
        self.folds, self._original = folds, original

    @overload
    def __call__(self, folded: nn.Module) -> nn.Module: ...
    @overload
    def __call__(self, folded: Mapping[str, Tensor]) -> Params: ...

    def __call__(self, folded: nn.Module | Mapping[str, Tensor]) -> nn.Module | Params:
        if isinstance(folded, nn.Module):
            return _with(folded, self)
        params = dict(folded)
        for fold in reversed(self.folds):
            params |= fold.undo(params, self._original)
        return params


def fold_norms(model: nn.Module) -> tuple[nn.Module, Unfold]:
    """A copy of the model whose norms have gain 1 and, where the maps behind them have biases, bias 0; and the inverse.

        W norm(x; g, beta) + b  =  (W diag(g)) norm(x; 1, 0) + (b + W beta)

    so that the function is the same.  Folded are the norms that only known maps read: before attention and MLP in
    pre-norm layers, and the last one where only a head of its own reads it.  Norms on the stream of a post-norm model,
    behind a branch, or in front of a tied head stay.  In a folded RMSNorm model whose head is not tied, any rotation of
    the residual stream is a symmetry on axes (``Orthogonal``).  The model is not modified.

    ``unfold(folded)`` takes the folded module, or ``Params`` of it, back.  Raises ``SymmetryError`` where nothing can
    be folded.

    >>> from symgeo.models.tiny_vit import TinyViT
    >>> folded, unfold = fold_norms(TinyViT())
    >>> bool((folded.blocks[0].mlp_norm.weight == 1).all()), len(unfold.folds)
    (True, 5)
    """
    folds = tuple(_foldable(model))
    if not folds:
        raise SymmetryError(f"fold_norms: {type(model).__name__} has no norm that only known linear maps read")
    original = {name: p.detach().clone() for name, p in model.named_parameters()}

    def fold(params: Params) -> Params:
        for one in folds:
            params = params | one.apply(params)
        return params

    return _with(model, fold), Unfold(folds, original)


def _foldable(model: nn.Module) -> Iterator[Fold]:
    found = recognise(model)
    for f in found:
        layer = f.layer.renamed(lambda name, prefix=f.prefix: f"{prefix}{name}")  # type: ignore[misc]
        for norm, branches in by_norm(layer.branches):
            linears = tuple(linear for branch in branches for linear in branch.core.consumers)
            readers = tuple(reader for branch in branches for reader in readers_of(branch.core).values())
            yield Fold(norm, linears, readers)
    for stack in stacks(model, found):
        prenorm = all(layer.prenorm for layer in stack.layers)
        if stack.final and stack.alone and not stack.tied and prenorm:
            yield Fold(stack.final, tuple(linear for linear, _ in stack.readers), tuple(r for _, r in stack.readers))


def _with(model: nn.Module, change: Callable[[Params], Params]) -> nn.Module:
    """A copy of the model with other parameters."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        moved = change({name: p.detach() for name, p in result.named_parameters()})
        for name, p in result.named_parameters():
            p.copy_(moved[name])
    return result
