"""Compression of an operator to low rank plus diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifolds.linalg import eigh
from symgeo.hessian.estimate import check_tol
from symgeo.hessian.operator import HessianOperator
from symgeo.hessian.space import Space
from symgeo.sharpness.result import check_count

_FRESH = 12  # vectors on which a fit is tested


@dataclass(frozen=True)
class LowRankPlusDiagonal:
    """``S ~ F diag(signs) F^T + diag(diagonal)``, with how well it reproduces products it was not made from.

    factor : ``(d, rank)``;  signs : ``(rank,)``, +1 or -1;  diagonal : ``(d,)``
    residual : relative error on fresh random vectors, an estimate of that of the matrix in the Frobenius norm
    iterations : of the alternation;  converged : whether the residual is within the tolerance
    products : with the operator;  sketched : relative error on the sketch it was made from, which is smaller
    """

    factor: Tensor
    signs: Tensor
    diagonal: Tensor
    residual: float
    iterations: int
    converged: bool
    space: Space
    products: int = 0
    sketched: float = math.nan

    def operator(self) -> HessianOperator:
        """The compressed matrix as an operator."""
        def product(v: Tensor) -> Tensor:
            return self.factor @ (self.signs.unsqueeze(1) * (self.factor.T @ v)) + self.diagonal.unsqueeze(1) * v

        return HessianOperator(product, self.space, f"rank {self.signs.numel()} plus diagonal")


def low_rank_plus_diagonal(operator: Any, rank: int, sketch: int | None = None, iterations: int = 200,
                           tol: float = 1e-10, seed: int = 0) -> LowRankPlusDiagonal:
    r"""Fits ``S ~ L + diag(d)``, ``rank L <= rank``, from ``sketch`` products (default ``4 rank + 8``).

    Alternates, on one Gaussian sketch ``M = S W`` (the alternation is derived here),

        R = M - d * W,   L = (R U) Lambda^-1 (R U)^T  with  W^T R = U Lambda U^T  cut to the largest |Lambda|,
        d_i = <(M - L W)_i, W_i> / |W_i|^2,

    until the residual on twelve fresh vectors is within ``tol``, or that on the sketch stops falling.  Exact for
    matrices that have this form; for others ``converged`` is False and ``residual`` says how good the fit is.  A
    diagonal belongs to a basis: the result is compression, and is not invariant under GL(h) even where the operator is.

    Raises ``ValueError`` unless ``rank <= sketch <= d``, and for a tolerance that is not positive.
    """
    size = operator.shape[0]
    check_count("rank", rank)
    check_count("iterations", iterations)
    check_tol(tol)
    width = min(4 * rank + 8, size) if sketch is None else check_count("sketch", sketch)
    if not rank <= width <= size:
        raise ValueError(f"needed rank <= sketch <= {size}; got rank {rank} and sketch {width}")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(size, width + _FRESH, generator=generator, dtype=torch.float64)
    images = operator @ draws.to(operator.device, operator.dtype)
    omega, fresh = draws.to(images).split([width, _FRESH], dim=1)
    image, target = images.split([width, _FRESH], dim=1)
    weight = omega.square().sum(1)
    diagonal, sketched, residual, count = torch.zeros_like(weight), math.inf, math.inf, 0
    factor, sign = omega[:, :rank] * 0, omega[0, :rank] * 0
    while count < iterations and residual > tol:
        count, before = count + 1, sketched
        factor, sign = _truncate(image - diagonal.unsqueeze(1) * omega, omega, rank)
        remainder = image - factor @ (sign.unsqueeze(1) * (factor.T @ omega))
        diagonal = (remainder * omega).sum(1) / weight
        sketched = _relative(remainder - diagonal.unsqueeze(1) * omega, image)
        missed = target - factor @ (sign.unsqueeze(1) * (factor.T @ fresh)) - diagonal.unsqueeze(1) * fresh
        residual = _relative(missed, target)
        if before - sketched <= 1e-6 * min(tol, sketched):
            break
    return LowRankPlusDiagonal(factor, sign, diagonal, residual, count, residual <= tol, operator.space,
                               width + _FRESH, sketched)


def _relative(part: Tensor, whole: Tensor) -> float:
    return float(part.norm()) / max(float(whole.norm()), torch.finfo(whole.dtype).tiny)


def _truncate(residual: Tensor, omega: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``F`` and signs with ``F diag(signs) F^T = (R U) Lambda^-1 (R U)^T``."""
    values, vectors = eigh(omega.T @ residual)
    top = values.abs().argsort(descending=True)[:rank]
    values, vectors = values[top], vectors[:, top]
    scale = values.abs()
    small = scale <= torch.finfo(scale.dtype).eps * scale.max()
    root = torch.where(small, 0.0, torch.where(small, 1.0, scale).rsqrt())
    return residual @ (vectors * root), values.sgn()
