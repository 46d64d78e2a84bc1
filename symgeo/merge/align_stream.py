"""Residual streams of several models turned into one frame, before anything else is aligned.

A rotation R of the stream acts on the rows a of what nothing else acts on (embeddings, and the head with the gain
before it) by ``a -> R a``.  The target's frame is that of the principal axes of its rows,

    sum_a a a^T = V diag(s) V^T,     R = V^T     (signs by a fixed functional of the rows, determinant 1)

which does not depend on how it was turned; every other model follows by the orthogonal Procrustes problem,

    R = argmin_R sum_a |R a - a_target|^2 = U W^T,     sum_a a_target a^T = U S W^T.

Rows are centred where embeddings may exchange a constant, and their means are left out where norms remove them.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import schur
from torch import Tensor

from manifolds.linalg import eigh, gram
from symgeo.functional import Params
from symgeo.merge.align_gauge import Gauge, balanced_gauge
from symgeo.symmetry import Action, Element, StreamRotation


def common_gauges(action: Action, models: dict[int, Params], reference: int) -> dict[int, Gauge]:
    """The models in their balanced gauges, their streams turned to that of the reference."""
    rotations = {name: flow for name, flow in action.flows.items() if isinstance(flow, StreamRotation)}
    exact = {i: {name: p.detach().double() for name, p in model.items()} for i, model in models.items()}
    turns = {i: Element({}) for i in models}
    for name, flow in rotations.items():
        rows = {i: anchors(action, flow, model) for i, model in exact.items()}
        home = principal_axes(rows[reference])
        goal = rows[reference] @ home.mT
        for i, model in exact.items():
            turn = home if i == reference else procrustes(rows[i], goal)
            step = action.element({name: half_turn(turn)})
            element = action.compose(step, step)
            exact[i], turns[i] = action.act(element, model), action.compose(element, turns[i])
    result = {}
    for i, model in exact.items():
        found = balanced_gauge(action, model)
        element = action.compose(found.element, turns[i]) if rotations else found.element
        result[i] = Gauge(element, found.params, found.sweeps, found.imbalance, found.converged, found.deficient)
    return result


def anchors(action: Action, flow: StreamRotation, params: Params) -> Tensor:
    """The rows (k, n) along the stream of the matrices on whose other axes no group acts, in the basis that turns."""
    pieces = []
    for axis in (*flow.writers, *flow.readers):
        x = params[axis.parameter]
        if x.ndim < 2 or _touched(action, axis.parameter, axis.index):
            continue
        rows, gain = x.movedim(axis.index, -1).reshape(-1, x.shape[axis.index]), axis.factor(params, x.dtype)
        rows = rows - rows.mean(0) if axis in flow.writers else rows if gain is None else rows * gain
        pieces.append(rows)
    return flow.reduced(torch.cat(pieces)) if pieces else flow.reduced(torch.zeros(0, 1))


def _touched(action: Action, parameter: str, index: int) -> bool:
    """Whether a group acts on another axis of a parameter."""
    return any(block.parameter == parameter and block.dims[block.position].axis != index
               for name in action.groups for block in action.blocks(name))


def principal_axes(rows: Tensor) -> Tensor:
    """The rotation (n, n) onto the principal axes of the rows, largest first."""
    vectors = eigh(gram(rows))[1].flip(1)
    weights = torch.linspace(1, 2, len(rows), dtype=rows.dtype, device=rows.device).sin()
    signs = torch.where(weights @ (rows @ vectors) < 0, -1.0, 1.0)
    return _special((vectors * signs).mT)


def procrustes(rows: Tensor, goal: Tensor) -> Tensor:
    """The rotation R (n, n) with the smallest ``sum_k |R rows_k - goal_k|^2``."""
    u, _, v = torch.linalg.svd(goal.mT @ rows)
    last = torch.ones(u.shape[-1], dtype=u.dtype, device=u.device)
    last[-1:] = torch.sign(torch.linalg.det(u) * torch.linalg.det(v))
    return (u * last) @ v


def _special(r: Tensor) -> Tensor:
    """With its last row negated where the determinant is -1."""
    signs = torch.ones(len(r), dtype=r.dtype, device=r.device)
    signs[-1:] = torch.sign(torch.linalg.det(r))
    return signs.unsqueeze(1) * r


def half_turn(r: Tensor) -> Tensor:
    """The coordinates t of :class:`symgeo.symmetry.StreamRotation` whose element, applied twice, is the rotation r:
    with ``r = Z diag(e^(i theta)) Z^H``, ``K = Z diag(2 i tan(theta / 4)) Z^H``."""
    triangle, basis = schur(r.cpu().numpy(), output="complex")
    angles = np.angle(np.diagonal(triangle))
    skew = ((basis * (2j * np.tan(angles / 4))) @ basis.conj().T).real
    upper = np.triu_indices(len(skew), 1)
    return torch.from_numpy(np.ascontiguousarray((0.5 * (skew - skew.T))[upper])).to(r)
