"""Dense matrices of small networks, for `precondition_from_a_group.py` and `custom_group.py`."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from symgeo.functional import Loss, Params


def flat(params: Params) -> Tensor:
    """All entries in one vector."""
    return torch.cat([p.flatten() for p in params.values()])


def unflat(vector: Tensor, like: Params) -> Params:
    """The inverse of `flat`."""
    pieces = vector.split([p.numel() for p in like.values()])
    return {name: piece.reshape(p.shape) for (name, p), piece in zip(like.items(), pieces)}


def dense_hessian(loss: Loss, params: Params, batch: object) -> Tensor:
    """By autograd, in flat order."""
    hessian: Tensor = torch.func.hessian(lambda vector: loss(unflat(vector, params), batch))(flat(params))
    return hessian


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two matrices."""
    return float((a * b).sum() / a.norm() / b.norm())


def side_by_side(matrices: Mapping[str, Tensor], power: float = 1.0) -> Figure:
    """Pictures of matrices, each in units of its largest entry, whose sizes are raised to a power."""
    figure, axes = plt.subplots(1, len(matrices), figsize=(3 * len(matrices), 3.3), layout="constrained")
    for ax, (name, matrix) in zip(axes, matrices.items()):
        sizes = (matrix.abs() / matrix.abs().max()) ** power
        ax.imshow(sizes * matrix.sign(), cmap="RdBu", vmin=-1, vmax=1)
        ax.set_title(name, fontsize=8)
        ax.set_axis_off()
    return figure
