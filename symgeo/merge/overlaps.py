"""How the adapters of a module lie to each other: principal angles and cosines over all pairs, batched."""

from __future__ import annotations

import torch
from torch import Tensor

from manifolds.linalg import gram
from symgeo.merge.problem import Problem, present


def overlaps(problem: Problem) -> dict[str, Tensor]:
    """Extremes over all pairs of adapters, ``(modules,)`` each, infinite where no pair defines them.

    ``overlap`` : largest ``|cos|`` between two deltas;  ``columns smallest``, ``columns largest``, ``rows smallest``,
    ``rows largest`` : principal angles in degrees between column and between row spaces (as many per pair as the
    smaller of the two ranks);  ``alignment`` : smallest cosine of a principal angle between the column spaces of two
    balanced ``[U S^(1/2); V S^(1/2)]``, which is what decides how two adapters are turned onto each other.
    """
    count, width = len(problem.adapters), max(s.shape[-1] for _, s, _ in problem.adapters)
    s = torch.stack([_padded(s.unsqueeze(-2), width).squeeze(-2) for _, s, _ in problem.adapters], dim=-2)
    pairs = torch.combinations(torch.arange(count, device=s.device))
    ranks = present(s).sum(-1)[:, pairs].amin(-1)  # (modules, pairs)
    x, y = (_blocks([adapter[side] for adapter in problem.adapters], s, pairs) for side in (0, 2))
    angles = {"columns": _cosines(x, ranks), "rows": _cosines(y, ranks)}
    result = {"overlap": _extreme(_delta_cosines(x, y, s, pairs), ranks, largest=True)}
    for name, (first, last) in angles.items():
        result[f"{name} smallest"] = _extreme(torch.rad2deg(torch.acos(first)), ranks, largest=False)
        result[f"{name} largest"] = _extreme(torch.rad2deg(torch.acos(last)), ranks, largest=True)
    result["alignment"] = _extreme(_cosines(0.5 * (x + y), ranks)[1], ranks, largest=False)
    return result


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _blocks(bases: list[Tensor], s: Tensor, pairs: Tensor) -> Tensor:
    """``Q_i^T Q_j`` of all pairs, ``(modules, pairs, r, r)``; directions without a singular value are zero."""
    count, width = s.shape[-2:]
    masked = torch.cat([_padded(q, width) * present(s[:, [i]]) for i, q in enumerate(bases)], dim=-1)
    products = gram(masked).unflatten(-1, (count, width)).unflatten(-3, (count, width)).transpose(-3, -2)
    return products[:, pairs[:, 0], pairs[:, 1]]


def _cosines(x: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The largest singular value of ``x`` and the one at position ``ranks``, both at most 1."""
    values = torch.linalg.svdvals(x).clamp(max=1.0)
    return values[..., 0], values.gather(-1, (ranks - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)


def _delta_cosines(x: Tensor, y: Tensor, s: Tensor, pairs: Tensor) -> Tensor:
    """``|<D_i, D_j>| / |D_i| |D_j|`` with ``<D_i, D_j> = sum (S_i X S_j) * Y``; any number where one is zero."""
    norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    unit = s / torch.where(norm > 0, norm, 1.0)
    first, second = unit[:, pairs[:, 0]], unit[:, pairs[:, 1]]
    return torch.einsum("mpa,mpab,mpb,mpab->mp", first, x, second, y).abs().clamp(max=1.0)


def _extreme(values: Tensor, ranks: Tensor, largest: bool) -> Tensor:
    """The extreme over the pairs in which both adapters differ from zero; infinite where there is none."""
    nothing = values.new_full((values.shape[0], 1), -torch.inf if largest else torch.inf)
    proper = torch.cat([nothing, torch.where(ranks > 0, values, nothing)], dim=-1)
    return proper.amax(-1) if largest else proper.amin(-1)
