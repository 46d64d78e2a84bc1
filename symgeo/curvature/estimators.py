"""The three estimators of curvature, from the second moments of weights and gradients over their orbits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manifolds.linalg import widen
from symgeo.curvature.decomposition import Decomposition
from symgeo.curvature.dense import DenseBlock
from symgeo.curvature.operator import InvariantOperator
from symgeo.curvature.structured import Block, StructuredBlock

ESTIMATORS = ("gradient", "riccati", "secant")
TRIVIAL = ("drop", "uncentred", "diagonal", "dense")


@dataclass(frozen=True)
class Moments:
    """Second moments over the orbit, from one sample or averaged over many.

    Attributes
    ----------
    gradient: S_g = R2(dg, dg), with the policy's block for the trivial kind (see `trivial_block`)
    weight: S_w = R2(dw, dw), for "riccati" and "secant"; mixed: S_gw = R2(dg, dw), for "secant"; the trivial blocks
        of these two are not used
    drop: whether the policy for the trivial kind is "drop"
    """

    gradient: InvariantOperator
    weight: InvariantOperator | None = None
    mixed: InvariantOperator | None = None
    drop: bool = False


def trivial_block(policy: str, x: Tensor) -> StructuredBlock:
    """The squared block of the trivial kind, from the coordinates x (M,) of the uncentred gradient.

    "drop": 0;  "uncentred" and "dense": x x^T;  "diagonal": diag(x^2).
    """
    if policy == "diagonal":
        return StructuredBlock.diagonal_of(x.square())
    column = x.unsqueeze(-1) if policy in ("uncentred", "dense") else x.new_zeros(len(x), 0)
    return StructuredBlock.outer(column, column)


def hessian(estimator: str, moments: Moments, damping: float = 0.0, inverse: bool = False) -> InvariantOperator:
    r"""The curvature H, or its inverse, from second moments.

    "gradient":  ``H = S_g^(1/2)``  (arXiv 2606.00442, Eq. 11);
    "riccati":   ``H = S_w^(-1/2) (S_w^(1/2) S_g S_w^(1/2))^(1/2) S_w^(-1/2)``  (Eq. 10), the positive semidefinite
        solution of ``H S_w H = S_g``; where S_w is singular, its projection on the range of S_w;
    "secant":    ``H S_w + S_w H = S_gw + S_gw^T``, the symmetric least-squares fit of ``dg = H dw`` (derived here),
        of least norm; it may be indefinite.

    Every power of "gradient" and "riccati" is damped (see `InvariantOperator`), those of S_w and of the inner matrix
    with their own largest eigenvalues; "secant" with damping is ``|H| + damping max |H|``.  The inverse is exact at
    equal damping, and the pseudo-inverse without.

    In "riccati" and "secant" the trivial kind, which centring leaves empty, has the block of "gradient"; with the
    policy "drop" its moments are zero and it is treated like every other kind.
    Raises ValueError if moments are missing, or damping is negative.
    """
    gradient = moments.gradient.power(-0.5 if inverse else 0.5, damping)
    if estimator == "gradient":
        return gradient
    weight = moments.weight
    if weight is None or (estimator == "secant" and moments.mixed is None):
        raise ValueError(f"{estimator} needs the moments of the weights too")
    weight = _replaced(weight, None)
    if estimator == "riccati":
        centred = _replaced(moments.gradient, None)
        result = _riccati(weight, centred, damping, inverse)
        return result if moments.drop else _replaced(result, gradient)
    assert moments.mixed is not None
    fitted = _secant(weight, moments.mixed)
    if not moments.drop:
        fitted = _replaced(fitted, moments.gradient.power(0.5))
    if inverse:
        return fitted.power(-1, damping)
    return fitted if damping == 0 else fitted.power(1, damping)


def _riccati(
    weight: InvariantOperator, gradient: InvariantOperator, damping: float, inverse: bool
) -> InvariantOperator:
    root = weight.power(0.5, damping)
    inner = gradient.congruent(root)
    if inverse:
        return inner.power(-0.5, damping).congruent(root)
    return inner.power(0.5, damping).congruent(weight.power(-0.5, damping))


def _secant(weight: InvariantOperator, mixed: InvariantOperator) -> InvariantOperator:
    blocks: list[Block] = []
    for bucket, w, m in zip(weight.decomposition.buckets, weight.blocks, mixed.blocks):
        if bucket.trivial:
            blocks.append(w)
        else:
            blocks.append(_lyapunov(w.to_dense(), m.to_dense()))
    return InvariantOperator(weight.decomposition, blocks)


def _lyapunov(weight: DenseBlock, mixed: DenseBlock) -> DenseBlock:
    """The Hermitian H of least norm with H T_w + T_w H = T_gw + T_gw^H.

    In the eigenbasis V, s of T_w it is ``(V^H c V)_ij / (s_i + s_j)`` on the range of T_w, ``V^H c / s_i`` between the
    range and its complement, and 0 on the complement.
    """
    spectrum = weight.spectrum()
    assert spectrum.vectors is not None
    c = widen(mixed.matrix + mixed.matrix.mH)
    s, v = spectrum.values, spectrum.vectors
    used = s > spectrum.threshold.unsqueeze(-1)
    s = torch.where(used, s, 1.0)
    v = torch.where(used.unsqueeze(-2), v, torch.zeros_like(v))
    inside = v @ ((v.mH @ c @ v) / (s.unsqueeze(-1) + s.unsqueeze(-2))) @ v.mH
    half = (v / s.unsqueeze(-2)) @ (v.mH @ c)
    across = half - (half @ v) @ v.mH
    return DenseBlock(0.5 * (inside + inside.mH) + across + across.mH)  # division by small sums amplifies rounding


def _replaced(operator: InvariantOperator, source: InvariantOperator | None) -> InvariantOperator:
    """With the trivial block of another operator, or zero."""
    at = operator.decomposition.trivial
    if at is None:
        return operator
    blocks = list(operator.blocks)
    blocks[at] = zero_block(operator.decomposition) if source is None else source.blocks[at]
    return InvariantOperator(operator.decomposition, blocks)


def zero_block(decomposition: Decomposition) -> StructuredBlock:
    """The zero block of the trivial kind."""
    at = decomposition.trivial
    copies = 0 if at is None else decomposition.buckets[at].copies
    return trivial_block("drop", torch.zeros(copies, dtype=torch.float64, device=decomposition.device))

