"""One parameter vector for each orbit, up to rotations, signs, phases and permutations.

Where a group is not compact the Euclidean distance between two models depends on the gauge of both.  So each is
first carried into a gauge of its own:

- along compensated directions: the moved source (a bias) is zero, the rows that read a LayerNorm have no component
  along its gain;
- along translations: no component along them;
- GL, rotary scales and positive scalings: plain and dual rows have equal Gram matrices, for all groups at once.
  That is the shortest vector of the orbit, unique up to compact elements (Kempf and Ness), found by balancing one
  group after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from symgeo.functional import Params
from symgeo.groups import GeneralLinear, PositiveScaling, Rotary
from symgeo.merge.align_groups import balancing
from symgeo.symmetry import Action, Compensation, Element, Flow, RowFreedom

_PASSES = 8  # compensated directions feed each other in one direction only
_NONCOMPACT = GeneralLinear | PositiveScaling | Rotary


@dataclass(frozen=True)
class Gauge:
    """A model in its balanced gauge.

    element, params : ``params = act(element, model)``, double precision;  sweeps : over all groups;
    imbalance : the largest relative difference of two Gram matrices that is left, of pairs with full rank;
    converged : whether it is at most the tolerance;  deficient : groups with pairs that have no balanced gauge.
    """

    element: Element
    params: Params
    sweeps: int
    imbalance: float
    converged: bool
    deficient: tuple[str, ...]


def balanced_gauge(action: Action, params: Params, tolerance: float = 1e-13, max_sweeps: int = 1000) -> Gauge:
    """Carry a model into its balanced gauge.

    Pairs without full rank (a dead unit, an adapter that is still zero) have no such gauge: they are brought once to
    a finite one that is nearly balanced, and are invariant only approximately.
    """
    start, moved = _without_drift(action, {name: p.detach().double() for name, p in params.items()})
    names = [name for name, group in action.groups.items() if isinstance(group, _NONCOMPACT)]
    parts, lacking, sweeps, imbalance = dict[str, Tensor](), dict[str, Tensor](), 0, 0.0
    while sweeps < max_sweeps:
        imbalance = 0.0
        for name in names:
            part, off, deficient = balancing(name, action.groups[name], *action.stack(name, moved))
            known = lacking.get(name, torch.zeros_like(deficient))
            lacking[name] = known | deficient
            off = torch.where(lacking[name], 0.0, off)
            imbalance = max(imbalance, float(off.max()) if off.numel() else 0.0)
            # what is balanced stays as it is, and a deficient pair is brought into a finite gauge only once
            still = known | (off <= tolerance) & ~lacking[name]
            if not bool(still.all()):
                part = _unless(still, action, name, part)
                moved = action.act(action.element({name: part}), moved)
                parts[name] = action.groups[name].compose(part, parts[name]) if name in parts else part
        sweeps += 1
        if imbalance <= tolerance:
            break
    element = action.compose(action.element(parts), start)
    missing = tuple(name for name, mask in lacking.items() if bool(mask.any()))
    return Gauge(element, moved, sweeps, imbalance, imbalance <= tolerance, missing)


def _unless(mask: Tensor, action: Action, name: str, part: Tensor) -> Tensor:
    """The part of an element, and the identity where the mask holds."""
    one = action.groups[name].identity(action.sizes[name], action.copies[name], part.real.dtype, part.device)
    return torch.where(mask.reshape(mask.shape + (1,) * (part.ndim - mask.ndim)), one, part)


def _without_drift(action: Action, params: Params) -> tuple[Element, Params]:
    """The model without components along translations and compensated directions, and the element that does it."""
    element = Element({})
    for _ in range(_PASSES):
        largest = 0.0
        for name in (*action.flows, *action.shifts):
            t = _drift(action, name, params)
            if t is None or not t.numel():
                continue
            step = Element({name: t})
            moved = action.act(step, params)
            change = max(_change(moved[key], params[key]) for key in moved)
            largest = max(largest, change)
            if change > 0:
                params, element = moved, action.compose(step, element)
        if largest <= 1e-15:
            break
    return element, params


def _drift(action: Action, name: str, params: Params) -> Tensor | None:
    """The coordinates of the flow or shift that brings the parameters to its section."""
    if name in action.flows:
        return section(action.flows[name], params)
    shift = action.shifts[name]
    return -fitted(shift.expand, shift.dimension, params)


def _change(a: Tensor, b: Tensor) -> float:
    return 0.0 if a is b else float((a - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny))


def fitted(expand: Callable[[Tensor], dict[str, Tensor]], size: int, params: Params) -> Tensor:
    """The coordinates t whose ``expand(t)`` is closest to the parameters: ``(E^T p) / (E^T E 1)``.

    E repeats and embeds coordinates, so that ``E^T E`` is diagonal.
    """
    like = next(iter(params.values()))
    zero = torch.zeros(size, dtype=torch.float64, device=like.device)
    tensors: dict[str, Tensor]
    tensors, adjoint = torch.func.vjp(expand, zero)  # type: ignore[misc]
    (numerator,) = adjoint({name: params[name].to(x.dtype) for name, x in tensors.items()})
    (count,) = adjoint(expand(torch.ones_like(zero)))
    return numerator / count.clamp_min(1.0)


def section(flow: Flow, params: Params) -> Tensor | None:
    """The coordinates t along which a flow is to move, so that every orbit is met in one point.

    Compensation: its first source has mean zero along the axes on which it is constant (a bias becomes 0); without
    readers its first writer, because embeddings share the source of what they exchange.  RowFreedom,
    ``W += u a^T``: ``W g = 0`` with the gain g (``W a = 0`` where a gain is zero).  Both hold in every gauge of the
    groups alike.  None for flows of other kinds, which are left alone.
    """
    if isinstance(flow, Compensation):
        taken = not flow.readers and bool(flow.writers)
        span = flow.writers[0] if taken else flow.sources[0]
        x = params[span.parameter]
        t = fitted(lambda t: {span.parameter: span.embed(t, x)}, span.size({span.parameter: tuple(x.shape)}), params)
        return flow.coordinates(t if taken else -t)
    if isinstance(flow, RowFreedom):
        weight, gain = params[flow.reader.weight], params[flow.gain].double()
        outputs = flow.reader.sizes({flow.reader.weight: tuple(weight.shape)})[0]
        one = torch.zeros(outputs, dtype=torch.float64, device=weight.device)
        one[0] = 1.0
        change = flow.displacement(one, params)[flow.reader.weight]
        direction = change[:, 0] if flow.reader.transposed else change[0]
        against = direction if bool((gain == 0).any()) else gain
        return -flow.reader.product(against, params) / (direction @ against)
    return None
