"""Which parameters an optimizer steps how: those that the symmetry names, the rest, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from symgeo.curvature import Decomposition
from symgeo.distributed import Processes, local
from symgeo.errors import SymmetryError
from symgeo.optim.averaged import Averaged
from symgeo.optim.corrected import Corrected
from symgeo.optim.eigenbasis import Eigenbasis
from symgeo.optim.options import Options
from symgeo.optim.rootfree import RootFree
from symgeo.optim.sharing import Alone, Shared, find_units
from symgeo.optim.space import Space
from symgeo.optim.storage import State
from symgeo.symmetry import Action, Symmetry

Group = dict[str, Any]
Named = list[tuple[str, Tensor]]


class Plan:
    """What follows from the groups of parameters, the symmetries and the options; built again when they change.

    Attributes
    ----------
    params: all parameters by name; members: those that the symmetry names and does not freeze; split: for each group
        its members and the rest, both with names; share: what this process owns of the members; sides: the statistics
        of each symmetry, of what is owned; symmetries: of that, without shifts and flows; corrected: the steps of
        these sides with corrected eigenvalues, or None

    Raises SymmetryError for a symmetry that does not fit, has no average, or does not commute with the other one.
    """

    def __init__(
        self, groups: Sequence[Group], symmetries: Sequence[Symmetry], options: Options, team: Processes | None = None
    ) -> None:
        params = {name: p for group in groups for name, p in zip(group["param_names"], group["params"])}
        self.params = params
        whole = [_linear_part(symmetry, options.compact) for symmetry in symmetries]
        actions = [symmetry.bind(params) for symmetry in whole]
        _check_same_names(actions)
        named = {name: name in actions[0].frozen for name in (*actions[0].layouts, *actions[0].frozen)}
        self.members: dict[str, Tensor] = {name: p for name, p in params.items() if named.get(name) is False}
        self.split: list[tuple[Named, Named]] = []
        self._groups: dict[str, Group] = {}
        for group in groups:
            pairs = list(zip(group["param_names"], group["params"]))
            here = [(name, p) for name, p in pairs if name in self.members]
            self.split.append((here, [(name, p) for name, p in pairs if name not in named]))
            self._groups |= {name: group for name, _ in here}
        self.dtype = _statistics_dtype(self.members, options)
        splits = [Decomposition(symmetry, self.members, options.compact) for symmetry in whole]
        if len(splits) == 2:
            _check_commuting(splits, actions)
        self.symmetries = whole
        self.share: Alone | Shared
        if team is None:
            self.share = Alone(self.members)
        else:
            units = find_units(list(self.members), actions, splits, options.trivial)
            self.share = Shared(team, self.members, units, self.dtype)
            elsewhere = self.members.keys() - self.share.owned.keys()
            self.symmetries = [symmetry.concrete(params).without(elsewhere) for symmetry in whole]
            splits = [Decomposition(symmetry, self.share.owned, options.compact) for symmetry in self.symmetries]
        self.sides = self._sides(options, splits)
        self.corrected = Corrected(self.sides, self.share.owned, self._decay, options) if options.corrected else None

    @cached_property
    def action(self) -> Action:
        """The symmetry bound to what is owned."""
        return self.symmetries[0].bind(self.share.owned)

    @cached_property
    def precisions(self) -> dict[str, torch.dtype]:
        """That of the momentum of every parameter: at least single."""
        return {name: torch.promote_types(p.dtype, torch.float32) for name, p in self.params.items()}

    @property
    def device(self) -> torch.device:
        """That of the members."""
        return next(iter(self.members.values())).device

    @property
    def rest(self) -> dict[str, Tensor]:
        """The parameters that AdamW steps."""
        return {name: p for _, rest in self.split for name, p in rest}

    def ready(self, state: State) -> bool:
        """Whether all sides have an operator from an earlier step."""
        return all(side.ready(state) for side in self.sides)

    @property
    def waits_for_nothing(self) -> bool:
        """Whether reading a number is free: on a CPU."""
        return bool(self.params) and all(p.device.type == "cpu" for p in self.params.values())

    def check_finite(self) -> None:
        """Raises ValueError naming a parameter whose gradient is not finite, or too large; waits for the device.

        Too large is a gradient whose square statistics cannot hold: a norm beyond ``sqrt(max) / 16``, 1e18 in single
        precision.
        """
        kinds: dict[torch.dtype, list[tuple[str, Tensor]]] = {}
        for name, p in self.params.items():
            if p.grad is not None:
                wide = self.dtype if name in self.members else self.precisions[name]
                kinds.setdefault(wide, []).append((name, local(p.grad)))
        for wide, found in kinds.items():
            norms = torch.stack(torch._foreach_norm([grad for _, grad in found], 2, wide))
            limit = torch.finfo(wide).max ** 0.5 / 16
            for (name, grad), fine in zip(found, (norms <= limit).tolist()):
                if not fine:
                    raise ValueError(_size_problem(name, grad, wide, limit))

    def check_gradients(self) -> None:
        """Raises ValueError naming a parameter whose gradient is sparse."""
        for name, p in self.params.items():
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(
                    f"parameter {name!r}: sparse gradients are not supported; use nn.Embedding(..., sparse=False), or"
                    " step it with torch.optim.SparseAdam"
                )

    def _sides(self, options: Options, splits: Sequence[Decomposition]) -> list[Averaged | RootFree]:
        result: list[Averaged | RootFree] = []
        for number, split in enumerate(splits):
            which = number if len(splits) == 2 else None
            space = Space(which, split, self.share.owned, options.trivial, self._decay, self.dtype)
            make = RootFree if options.roots == "group" else Eigenbasis if options.corrected else Averaged
            result.append(make(space, options))
        return result

    def _decay(self, name: str) -> float:
        return float(self._groups[name]["betas"][1])


def _size_problem(name: str, grad: Tensor, dtype: torch.dtype, limit: float) -> str:
    if not bool(torch.isfinite(grad).all()):
        return f"the gradient of {name!r} is not finite; skip this step, or clip gradients before it"
    return (f"the gradient of {name!r} has the norm {float(grad.double().norm()):.1e}, and statistics in {dtype} hold"
            f" the squares of norms up to {limit:.1e}; scale the loss down, or clip gradients before this step")


def _statistics_dtype(members: Mapping[str, Tensor], options: Options) -> torch.dtype:
    """At least single precision; double for estimators that divide by the second moment of the weights."""
    dtype = torch.float32 if options.estimator == "gradient" else torch.float64
    for p in members.values():
        dtype = torch.promote_types(dtype, p.dtype)
    return dtype


def _linear_part(symmetry: Symmetry, compact: bool) -> Symmetry:
    """Without translations, which leave gradients alone, and without flows, whose maximal compact part is trivial."""
    if symmetry.flows and not compact:
        raise SymmetryError(
            f"flow {next(iter(symmetry.flows))!r} has no average: it is a shear, whose maximal compact subgroup is"
            " trivial; pass compact=True to leave it out"
        )
    return replace(symmetry, shifts={}, flows={}) if symmetry.shifts or symmetry.flows else symmetry


def _check_same_names(actions: Sequence[Action]) -> None:
    if len(actions) == 2:
        one, other = (set(action.layouts) for action in actions)
        for name in sorted(one ^ other):
            raise SymmetryError(
                f"symmetry: of the pair only the {'first' if name in one else 'second'} names parameter {name!r}; both"
                " must name the same parameters"
            )


def _check_commuting(splits: Sequence[Decomposition], actions: Sequence[Action]) -> None:
    """Both must act on every parameter by one irreducible group of its own, on the two axes of a matrix."""
    for split, which in zip(splits, ("first", "second")):
        for bucket in split.buckets:
            for kind, rows in zip(bucket.kinds, bucket.rows):
                names = list(dict.fromkeys(name for name, *_ in rows))
                if bucket.batch != 1 or not kind or len(rows) != 1 or len(split.shapes[names[0]]) != 2:
                    raise SymmetryError(
                        f"symmetry: a pair must commute, and the {which} one does not act on"
                        f" {' and '.join(map(repr, names[:2]))} by one irreducible group on one axis of one matrix"
                        " (an Orthogonal() of its own for every matrix does)"
                    )
    one, other = (_axes(action) for action in actions)
    for name in one:
        if one[name] & other[name] or len(one[name] | other[name]) != 2:
            raise SymmetryError(
                f"symmetry: a pair must commute, and the two act on axes {sorted(one[name])} and {sorted(other[name])}"
                f" of parameter {name!r}; they must act on one axis each, and not on the same"
            )


def _axes(action: Action) -> dict[str, set[int]]:
    """For every parameter the axes on which some group acts."""
    found: dict[str, set[int]] = {}
    for name in action.groups:
        for block in action.blocks(name):
            found.setdefault(block.parameter, set()).add(block.dims[block.position].axis)
    return found


def check_overrides(group: Mapping[str, Any]) -> None:
    """Raises ValueError for an entry of a group that is an option of the whole optimizer."""
    whole = set(Options.__dataclass_fields__) - {"sides"} | {"symmetry"}
    for key in group:
        if key in whole:
            raise ValueError(f"param_groups: {key!r} is the same for all groups; give it to SymO itself")


def check_group(group: Group, others: Iterable[str]) -> None:
    """Raises ValueError for names that are missing or taken, complex parameters, and numbers out of range."""
    names = group.get("param_names")
    if names is None:
        raise ValueError(
            "named_params: needed pairs (name, parameter), as model.named_parameters() gives them; found parameters"
            " without names"
        )
    for name, p in zip(names, group["params"]):
        if names.count(name) > 1 or name in others:
            raise ValueError(f"named_params: the name {name!r} is given more than once")
        if p.is_complex():
            raise ValueError(f"parameter {name!r}: complex parameters are not supported; use torch.view_as_real")
    lr, betas, rest_lr = group["lr"], group["betas"], group["rest_lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor with one entry; got shape {tuple(lr.shape)}")
    for key, value in (("lr", float(lr)), ("weight_decay", group["weight_decay"]), ("rest_lr", rest_lr or 0.0)):
        if not (isfinite(value) and value >= 0):
            raise ValueError(f"{key} must be finite and >= 0; got {value}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1); got {betas}")


def rest_rate(group: Group) -> float | Tensor:
    """The learning rate of AdamW: rest_lr, times what a scheduler has made of lr."""
    lr, rest_lr, base_lr = group["lr"], group["rest_lr"], group["base_lr"]
    if rest_lr is None:
        return lr
    return rest_lr if base_lr == 0 else lr * (rest_lr / base_lr)
