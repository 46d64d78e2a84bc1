r"""Eigenvalue correction: averages of squared gradients in the eigenbasis of the statistics, taken at every step.

For a pair of symmetries with eigenvectors Q_L, Q_R, renewed every few steps, this is SOAP (arXiv 2409.11321)

    G' = Q_L^T G Q_R,   V <- b2 V + (1 - b2) G' o G',   step = Q_L (M' o (V / (1 - b2^t))^(-power)) Q_R^T,
    M' = Q_L^T mh Q_R,  L <- b2 L + (1 - b2) G G^T,     R <- b2 R + (1 - b2) G^T G

with power = 1/2, and KL-SOAP (arXiv 2509.03378) with

    L <- b2 L + (1 - b2) G R^-1 G^T,   R <- b2 R + (1 - b2) G^T L^-1 G

with the L, R of before on the right hand sides, each divided by its mean eigenvalue, and averaged as if from 1, so
that no scale has to be chosen and none drifts.  For inverses, eigenvalues are those of ``diag(Q^T L Q)``.  As in both
papers a gradient is projected on a basis that does not know it yet (on its own one it would be diagonal): the first
gradient starts L and R, enters no V, and nothing moves.  V is kept when the basis changes, in ascending order of the
eigenvalues.

For one symmetry V must commute with the group, and so it has one number for each eigenvector of a kind, the mean over
the dimensions of the irreducible representation: the trajectory moves along with every element of the group, as
without correction.  Entries of their own in the basis of one side would be equivariant under the other side only.
Kinds with one copy are those of Adam: ``mh / sqrt(V)`` where the symmetry is SignFlip on all axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from symgeo.curvature.spectrum import largest_of
from symgeo.functional import Params
from symgeo.optim.adamw import full_precision
from symgeo.optim.averaged import Averaged
from symgeo.optim.eigenbasis import Eigenbasis, debiased_copies, moved
from symgeo.optim.momentum import steps_after
from symgeo.optim.options import Options
from symgeo.optim.rootfree import RootFree
from symgeo.optim.storage import State

#: the key of V of a pair in the state of a parameter, in the basis
SQUARES = "rotated_avg_sq"


class Corrected:
    """Steps of one symmetry, or of a pair, with corrected eigenvalues; see the module.

    Parameters
    ----------
    members: the parameters by name; sides: their statistics, one or two; decays: a name -> its betas[1] at present

    Raises ValueError naming a parameter without memory in its second moment.
    """

    def __init__(
        self, sides: Sequence[Averaged | RootFree], members: Mapping[str, Tensor], decays: Callable[[str], float],
        options: Options,
    ) -> None:
        for name in members:
            if decays(name) == 0:
                raise ValueError(
                    f"betas: corrected=True averages squares over time and needs betas[1] > 0; got 0 for {name!r}")
        self._sides = [side for side in sides if isinstance(side, Eigenbasis)]
        self._members, self._decays, self._options = members, decays, options
        self._values = [side.copies.stacks("corrected") for side in self._sides[:1]]

    def step(self, state: State, mean: Mapping[str, Tensor], gradient: Mapping[str, Tensor], due: bool) -> Params:
        """The step along the debiased momentum; the gradient enters the averages, and the basis is renewed if due."""
        if len(self._sides) == 2:
            return self._pair(state, mean, gradient, due)
        [side], [stacks] = self._sides, self._values
        xs, ms = side.space.encode(gradient), side.rotate(state, side.space.encode(mean))
        values = []
        for i, (stack, energy) in enumerate(zip(stacks, side.energies(state, side.rotate(state, xs)))):
            v = stack.stored(state)
            decay = side.copies.decay(i)
            v.lerp_(energy, 1 - decay if isinstance(decay, float) else (1 - decay).to(v.dtype).expand_as(v))
            values.append(torch.zeros_like(v) if side.drops(i) else debiased_copies(side, state, i, v))
        factors = powers(values, self._options.power, self._options.damping)
        found = side.space.decode(side.back(state, [f.unsqueeze(-1) * m for f, m in zip(factors, ms)]))
        side.update(state, xs, None)
        if due:
            side.refresh(state, xs, None)
        return found

    def _pair(self, state: State, mean: Mapping[str, Tensor], gradient: Mapping[str, Tensor], due: bool) -> Params:
        first, second = self._sides
        names = list(self._members)
        if not names:  # all parameters are with other processes, which agree on the damping
            powers([], self._options.power, self._options.damping)
            return {}
        ms, gs = ([both[name] for name in names] for both in (self._rotated(state, x) for x in (mean, gradient)))
        factors = powers(self._squares(state, names, gs), self._options.power, self._options.damping)
        scaled = dict(zip(names, torch._foreach_mul(ms, factors)))
        found = moved(first, first.back, state, moved(second, second.back, state, scaled))
        seen = [gradient, gradient]
        if self._options.divergence == "kl":
            seen = [moved(second, second.whitened, state, gradient), moved(first, first.whitened, state, gradient)]
        for side, tensors in zip(self._sides, seen):
            xs = side.space.encode(tensors)
            side.update(state, xs, None)
            if due:
                side.refresh(state, xs, None)
        return found

    def _rotated(self, state: State, tensors: Mapping[str, Tensor]) -> Params:
        """Q_L^T X Q_R"""
        first, second = self._sides
        return moved(second, second.rotate, state, moved(first, first.rotate, state, tensors))

    def _squares(self, state: State, names: Sequence[str], rotated: list[Tensor]) -> list[Tensor]:
        """V / (1 - b2^t) with one more gradient."""
        states = [state[self._members[name]] for name in names]
        decays = [self._decays(name) for name in names]
        for name, entry in zip(names, states):
            if SQUARES not in entry:
                entry[SQUARES] = full_precision(self._members[name])
        squares = [entry[SQUARES] for entry in states]
        torch._foreach_mul_(squares, decays)
        rotated = [y.to(v.dtype) for y, v in zip(rotated, squares)]
        torch._foreach_addcmul_(squares, rotated, rotated, [1 - b2 for b2 in decays])
        # the first gradient had no basis but in a matrix with one entry
        counts = [max(1, steps_after(state, self._members[name]) - (v.numel() > 1)) for name, v in zip(names, squares)]
        return list(torch._foreach_div(squares, [1 - b2**t for b2, t in zip(decays, counts)]))


def powers(values: Sequence[Tensor], power: float, damping: float) -> list[Tensor]:
    r"""``(v + damping v_max)^-power``, v_max the largest entry of all tensors; 0 for 0.

    >>> powers([torch.tensor([4.0, 0.0]), torch.tensor([16.0])], 0.5, 0.0)
    [tensor([0.5000, 0.0000]), tensor([0.2500])]
    """
    largest = largest_of(torch._foreach_norm(list(values), float("inf")) if values else [], damping)
    if not values:
        return []
    scale = torch.where(largest > 0, largest, 1.0)
    shifted = torch._foreach_div(list(values), scale)
    torch._foreach_add_(shifted, damping)
    positive = torch._foreach_sign(shifted)
    torch._foreach_add_(shifted, torch._foreach_add(torch._foreach_neg(positive), 1.0))  # 1 in the place of 0
    found = torch._foreach_mul(torch._foreach_pow(shifted, -power), positive)
    return list(torch._foreach_mul(found, torch.where(largest > 0, scale.pow(-power), 0.0)))
