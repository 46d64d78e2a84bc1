"""Alignment of one model with another over all groups of a symmetry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from symgeo.functional import Params
from symgeo.merge.align_checks import check_same
from symgeo.merge.align_search import Search, place, refine, remaining_steps
from symgeo.merge.align_steps import Step, clusters
from symgeo.merge.align_stream import common_gauges
from symgeo.merge.align_units import permutations_of_units
from symgeo.symmetry import Action, Element, Symmetry


@dataclass(frozen=True)
class Alignment:
    """What :func:`align_report` returns.

    params, element : the moved source, ``params = act(element, source)``;  distance : that of both models in their
    balanced gauges, the square root of the objective;  history : the objective after the start and after every
    sweep of the best search;  converged : whether its last sweep found nothing more to gain and both models could
    be balanced;  deficient : groups with pairs that have no balanced gauge.
    """

    params: Params
    element: Element
    distance: float
    history: tuple[float, ...]
    converged: bool
    deficient: tuple[str, ...]

    @property
    def sweeps(self) -> int:
        """The number of sweeps of the best search."""
        return len(self.history) - 1

    def to_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {"distance": self.distance, "history": list(self.history), "sweeps": self.sweeps,
                "converged": self.converged, "deficient": list(self.deficient)}


def align(
    symmetry: Symmetry,
    source: Params,
    target: Params,
    *,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    restarts: int = 0,
    seed: int = 0,
    max_sweeps: int = 100,
) -> tuple[Params, Element]:
    """The element g of the symmetry that brings the source closest to the target, and ``act(g, source)``.

    Both are carried into their balanced gauges, ``x = act(a, source)`` and ``y = act(b, target)`` (see
    :func:`symgeo.merge.align_gauge.balanced_gauge`), where only permutations, signs, rotations and phases are left:

        k = argmin_k |act(k, x) - y|^2,     g = b^-1 k a.

    So the result does not depend on the gauge of the source, and moves along with that of the target:
    ``align(s, act(p, source), act(q, target))[0] == act(q, align(s, source, target)[0])``, up to rounding (and, where q
    has compensated directions, which depend on parameters that differ here, up to those).

    Each step solves one group exactly, a permutation together with the groups that have a copy for each of its
    indices: heads are matched by the quotient distance of their pairs, hidden units with signs by ``|<x_i, y_j>|``.
    Steps are repeated until none gains anything.  The start places the groups one by one, using only blocks whose
    other axes are in place; it finds the element exactly if source and target are one model in two gauges.  In
    general the search may end in a local optimum: ``restarts`` more searches with random orders and scores, drawn
    from ``seed``, are tried, and the best is kept.

    With ``model`` and ``batches`` the permutations are found from activations instead: by the sum of the
    correlations of matched hidden units (of canonical correlations, for heads) in the outputs of linear and
    convolution layers; permutations that no such output has are matched by weights.  Buffers are the model's own.

    Residual streams are turned first (:mod:`symgeo.merge.align_stream`).  Translations and compensated directions are
    brought to the target's along fixed sections (but gains stored off zero, biases of norms before maps without one
    and scales of streams, which stay as they are).  Frozen parameters stay.  All in double precision; the dtype of the
    source is kept.

    Raises ``ValueError`` naming the parameter where the two do not agree in names, shapes, dtypes or devices, or
    are not finite.

    >>> from symgeo.groups import Permutation
    >>> mlp = Symmetry({"up": "h _", "down": "_ h*"}, {"h": Permutation()})
    >>> target = {"up": torch.tensor([[1.0], [2.0], [3.0]]), "down": torch.ones(1, 3)}
    >>> source = {"up": target["up"].flip(0), "down": target["down"]}
    >>> moved, element = align(mlp, source, target)
    >>> element["h"], torch.equal(moved["up"], target["up"])
    (tensor([2, 1, 0]), True)
    """
    found = align_report(symmetry, source, target, model=model, batches=batches, restarts=restarts, seed=seed,
                         max_sweeps=max_sweeps)
    return found.params, found.element


@torch.no_grad()
def align_report(
    symmetry: Symmetry,
    source: Params,
    target: Params,
    *,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    restarts: int = 0,
    seed: int = 0,
    max_sweeps: int = 100,
) -> Alignment:
    """:func:`align` with a report of the search."""
    check_same({"target": target, "source": source})
    action = symmetry.bind(target)
    aligner = Aligner(action, model, batches, restarts, seed, max_sweeps)
    gauges = common_gauges(action, {0: source, 1: target}, reference=1)
    x, y = gauges[0], gauges[1]
    found, _ = aligner.search(source, x.params, target, y.params)
    element = action.compose(action.inverse(y.element), action.compose(found.element, x.element))
    return Alignment(
        action.act(element, source), element, found.history[-1] ** 0.5, tuple(found.history),
        found.converged and x.converged and y.converged, tuple(dict.fromkeys((*x.deficient, *y.deficient))),
    )


@dataclass(frozen=True)
class Aligner:
    """The searches of :func:`align`, with its settings, between balanced models."""

    action: Action
    model: nn.Module | None = None
    batches: Iterable[Any] | None = None
    restarts: int = 0
    seed: int = 0
    max_sweeps: int = 100

    def __post_init__(self) -> None:
        if (self.model is None) != (self.batches is None):
            raise ValueError("model and batches belong together: activations need both; found only one of them")
        for name, value, least in (("restarts", self.restarts, 0), ("max_sweeps", self.max_sweeps, 1)):
            if value < least:
                raise ValueError(f"{name}: needed at least {least}, found {value}")

    def search(self, source: Params, x: Params, target: Params, y: Params) -> tuple[Search, list[Step]]:
        """The best search that brings the balanced source ``x`` to the balanced target ``y``, and its steps."""
        action = self.action
        start, steps = Search(x, Element({})), clusters(action)
        if self.model is not None and self.batches is not None:
            matched = permutations_of_units(action, self.model, self.batches, source, target)
            start, steps = start.moved(action, matched), remaining_steps(action, steps, matched)
        generator = torch.Generator().manual_seed(self.seed)
        best = refine(action, place(action, start, steps, y), steps, y, self.max_sweeps)
        for _ in range(self.restarts):
            shuffled = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
            luck = torch.randn(len(steps), generator=generator).exp().tolist()
            other = refine(action, place(action, start, shuffled, y, luck), shuffled, y, self.max_sweeps)
            best = min(best, other, key=lambda one: one.history[-1])
        return best, steps
