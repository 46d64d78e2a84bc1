"""Presets that treat every matrix, or every entry, alone: Muon, Shampoo, Adam."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from symgeo.groups import Orthogonal, SignFlip
from symgeo.optim.presets.selection import matrices, selected
from symgeo.symmetry import Symmetry

Exclude = Iterable[str | nn.Module]


def muon(model: nn.Module, exclude: Exclude = ()) -> Symmetry:
    r"""Orthogonal on the longer axis of every weight matrix.

    With G (m, n), n >= m, the step is ``(EMA(mh mh^T) / n)^(-1/2) mh``: one-sided Shampoo, and for b2 = 0 Muon,
    ``sqrt(n) U V^T``.  Of a square matrix the first axis (the outputs of nn.Linear) is taken.

    Matrices are all 2-D parameters but nn.Embedding weights, what is tied to them, output heads (modules named
    lm_head, classifier, score or head), and `exclude` (names or modules).  Coarser than a symmetry of the loss,
    which knows permutations of hidden units only: every matrix by itself, and all rotations.

    ``SymO(..., betas=(0.95, 0.0), damping=0.0, nesterov=True)`` is torch.optim.Muon with exact polar factors; its
    learning rate is that of torch times ``sqrt(max(1, rows / columns)) / sqrt(max(rows, columns))``, matrix by matrix.
    These betas are also the good choice of defaults, with a learning rate near 1e-3 and, in single precision,
    damping=1e-9: on a small language model (benchmarks/optimizers.py) memory in the second moment (b2 = 0.99) lost
    more than 0.1 nats, at about half the cost.  Where it is wanted: graft="adam", damping=1e-6, update_every=10.

    Parameters that are no matrices are stepped by AdamW with the betas of their group: with b2 = 0 give them a group
    of their own, with betas such as (0.9, 0.99).  A 2-D parameter that is no matrix, such as a table of positions
    kept as a parameter, belongs into `exclude`.

    >>> muon(nn.Linear(5, 3)).tensors
    {'weight': '_ n[weight]'}
    """
    return _one_sided({name: 0 if p.shape[0] >= p.shape[1] else 1 for name, p in matrices(model, exclude).items()}, "n")


def shampoo(model: nn.Module, exclude: Exclude = ()) -> tuple[Symmetry, Symmetry]:
    r"""Orthogonal on the columns, and on the rows, of every weight matrix: a pair, whose geometric mean is Shampoo.

    With ``L = EMA(mh mh^T)``, ``R = EMA(mh^T mh)`` of a matrix (m, n) the step is
    ``(m n)^(1/4) L^(-1/4) mh R^(-1/4)``; with ``power=1`` it is ``(m n)^(1/2) L^(-1/2) mh R^(-1/2)``.
    Matrices and `exclude` as in `muon`, and coarser than a symmetry of the loss like that.

    Good choices on a small language model (benchmarks/optimizers.py): ``betas=(0.9, 0.95), nesterov=True, power=1.0,
    graft="adam", damping=1e-6, update_every=5`` and a learning rate near 6e-3.

    With ``corrected=True`` this pair is SOAP, and with ``divergence="kl"`` in addition KL-SOAP: Adam in the basis of
    the eigenvectors of L and R; see `symgeo.optim.corrected`.  There ``betas=(0.95, 0.95), damping=1e-10,
    update_every=10`` and a learning rate near 4e-3.

    >>> [symmetry.tensors for symmetry in shampoo(nn.Linear(5, 3))]
    [{'weight': '_ n[weight]'}, {'weight': 'm[weight] _'}]
    """
    names = matrices(model, exclude)
    return _one_sided(dict.fromkeys(names, 1), "n"), _one_sided(dict.fromkeys(names, 0), "m")


def adam(model: nn.Module, exclude: Exclude = ()) -> Symmetry:
    r"""SignFlip on every axis of every parameter: the diagonal, ``mh / sqrt(EMA(mh^2))``.

    Adam but for the second moment, which is that of the averaged gradient; b1 = 0 is RMSProp.  Scalars are left out.
    Coarser than a symmetry of the loss.  Use damping=0 or a very small one, which is relative to the largest entry of
    all parameters together.
    `exclude` as in `muon`; embeddings and heads are in.

    >>> adam(nn.Linear(5, 3)).tensors
    {'weight': 'a0[weight] a1[weight]', 'bias': 'a0[bias]'}
    """
    axes = {name: [f"a{i}[{name}]" for i in range(p.dim())] for name, p in selected(model, exclude).items() if p.dim()}
    groups = {axis: SignFlip() for names in axes.values() for axis in names}
    return Symmetry({name: " ".join(names) for name, names in axes.items()}, groups)


def _one_sided(axes: dict[str, int], letter: str) -> Symmetry:
    """Orthogonal on one axis of every matrix."""
    groups = {name: f"{letter}[{name}]" for name in axes}
    tensors = {name: f"{groups[name]} _" if axis == 0 else f"_ {groups[name]}" for name, axis in axes.items()}
    return Symmetry(tensors, {group: Orthogonal() for group in groups.values()})


