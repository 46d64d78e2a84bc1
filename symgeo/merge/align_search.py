"""The search for the compact element that brings one balanced model closest to another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from symgeo.functional import Params
from symgeo.groups import Permutation
from symgeo.merge.align_steps import Step, compact_names, single
from symgeo.symmetry import Action, Element

_SMALL = 1e-24  # of a squared distance, relative to the squared length: what rounding leaves


@dataclass
class Search:
    """The state of a search: ``params = act(element, source)``.

    history : the squared distance to the target, at the start and after every sweep;  converged : whether the last
    sweep found nothing more to gain.
    """

    params: Params
    element: Element
    history: list[float] = field(default_factory=list)
    converged: bool = False

    def moved(self, action: Action, parts: dict[str, Tensor]) -> Search:
        """The state after an element with these parts."""
        if not parts:
            return self
        step = action.element(parts)
        return Search(action.act(step, self.params), action.compose(step, self.element))


def place(
    action: Action, start: Search, steps: Sequence[Step], target: Params, luck: Sequence[float] | None = None
) -> Search:
    """Every group once, the one with the largest share of anchored blocks first.

    A block is anchored when the compact groups on its other axes are in place: then what it says does not depend on
    the gauge of the source.  ``luck`` multiplies the shares.
    """
    found, placed, waiting = start, set[str](), dict(enumerate(steps))
    movable = {name for step in steps for name in step.members}
    while waiting:
        shares = {
            i: _share(action, step, found.params, placed, movable) * (luck[i] if luck else 1.0)
            for i, step in waiting.items()
        }
        step = waiting.pop(max(shares, key=lambda i: (shares[i], -i)))
        anchored = [part for part in step.parts if part.others & movable <= placed]
        found = found.moved(action, step.solve(action, found.params, target, anchored or step.parts))
        placed |= set(step.members)
    return found


def _share(action: Action, step: Step, params: Params, placed: set[str], movable: set[str]) -> float:
    """The share of a step's squared length that lies in anchored blocks."""
    energy = [(part, float(part.rows(action, params).square().sum())) for part in step.parts]
    anchored = sum(value for part, value in energy if part.others & movable <= placed)
    return anchored / max(sum(value for _, value in energy), 1e-300)


def refine(action: Action, start: Search, steps: Sequence[Step], target: Params, max_sweeps: int = 100) -> Search:
    """Sweeps over all steps until none brings the models closer; a step that does not is undone."""
    found = Search(start.params, start.element)
    scale = sum(float(x.square().sum()) for x in target.values())
    value = squared_distance(found.params, target)
    history = [value]
    for _ in range(max_sweeps):
        for step in steps:
            moved = found.moved(action, step.solve(action, found.params, target, step.parts))
            after, before = (squared_distance(one.params, target, step.parameters) for one in (moved, found))
            if after <= before:
                found = moved
        before, value = value, squared_distance(found.params, target)
        history.append(value)
        if value >= before * (1 - 1e-12) or value <= _SMALL * scale:
            return Search(found.params, found.element, history, True)
    return Search(found.params, found.element, history, False)


def remaining_steps(action: Action, steps: Sequence[Step], fixed: Iterable[str]) -> list[Step]:
    """The steps of all groups but some that are fixed: whole clusters without those, and groups alone."""
    kept = set(fixed)
    untouched = [step for step in steps if not kept & set(step.members)]
    covered = {name for step in untouched for name in step.members} | kept
    return untouched + [single(action, name) for name in compact_names(action) if name not in covered]


def permutation_names(action: Action) -> list[str]:
    """The groups that are permutations."""
    return [name for name, group in action.groups.items() if isinstance(group, Permutation)]


def squared_distance(a: Params, b: Params, names: Iterable[str] | None = None) -> float:
    """``sum |a - b|^2`` over the parameters with these names (default: all)."""
    return sum(float((a[name] - b[name]).square().sum()) for name in (a if names is None else names))
