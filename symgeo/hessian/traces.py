"""Traces and diagonals from products with random vectors, with their standard errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from symgeo.hessian.estimate import Estimate, TensorEstimate, mean_estimate
from symgeo.sharpness.result import check_count

METHODS = ("hutchinson", "hutch++", "xtrace")
_BLOCK = 64  # columns in memory at once


def trace(operator: Any, samples: int | None, seed: int, method: str) -> Estimate:
    """The trace of a symmetric operator; see the methods.  ``ValueError`` for an unknown one or too few samples."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if samples is None:
        return Estimate(float(exact_diagonal(operator).sum()))
    check_count("samples", samples)
    generator = torch.Generator().manual_seed(seed)
    if method == "hutchinson":
        return hutchinson(operator, samples, generator)
    needed = {"hutch++": 6, "xtrace": 4}[method]
    if samples < needed:
        raise ValueError(f"method={method!r} needs samples >= {needed}; got {samples}")
    estimator = hutchpp if method == "hutch++" else xtrace
    return estimator(operator, min(samples, 3 * operator.shape[0]), generator)


def diagonal(operator: Any, samples: int | None, seed: int) -> TensorEstimate:
    """The diagonal: exact by d products, or the mean of ``v * (S v)`` over random signs ``v``."""
    if samples is None:
        value = exact_diagonal(operator)
        return TensorEstimate(value, torch.zeros_like(value), 0)
    check_count("samples", samples)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.cat([v * (operator @ v) for v in _blocks(operator, samples, generator)], dim=1)
    spread = draws.std(dim=1) if samples > 1 else torch.full_like(draws[:, 0], torch.inf)
    return TensorEstimate(draws.mean(dim=1), spread / samples**0.5, samples)


def exact_diagonal(operator: Any) -> Tensor:
    """The diagonal ``(d,)``, by d products."""
    size, pieces = operator.shape[0], [torch.zeros(0, dtype=operator.dtype, device=operator.device)]
    for start in range(0, size, _BLOCK):
        width = min(_BLOCK, size - start)
        unit = torch.zeros(size, width, dtype=operator.dtype, device=operator.device)
        unit[start:start + width] = torch.eye(width, dtype=operator.dtype, device=operator.device)
        pieces.append((operator @ unit)[start:start + width].diagonal())
    return torch.cat(pieces)


def signs(operator: Any, count: int, generator: torch.Generator) -> Tensor:
    """Independent random signs ``(d, count)``."""
    bits = torch.randint(0, 2, (operator.shape[0], count), generator=generator)
    return (2 * bits - 1).to(operator.device, operator.dtype)


def hutchinson(operator: Any, samples: int, generator: torch.Generator) -> Estimate:
    """``mean v^T S v`` over random signs (Hutchinson 1989); ``samples`` products."""
    draws = [(v * (operator @ v)).sum(0) for v in _blocks(operator, samples, generator)]
    return mean_estimate(torch.cat(draws))


def hutchpp(operator: Any, samples: int, generator: torch.Generator) -> Estimate:
    """Hutch++ (Meyer et al., arXiv 2010.09649): the trace on a sketched range, and Hutchinson off it.

    A third of the products each for the sketch ``Q = orth(S X)``, for ``tr Q^T S Q``, and for the rest.
    """
    width = min(samples // 3, operator.shape[0])
    q = torch.linalg.qr(operator @ signs(operator, width, generator)).Q
    captured = float((q * (operator @ q)).sum())
    v = signs(operator, samples - 2 * (samples // 3), generator)
    v = v - q @ (q.T @ v)
    rest = mean_estimate((v * (operator @ v)).sum(0))
    return Estimate(captured + rest, rest.stderr, samples)


def xtrace(operator: Any, samples: int, generator: torch.Generator) -> Estimate:
    """XTrace (Epperly, Tropp, Webber, arXiv 2301.07825): each vector tests the sketch made by all others.

    With ``Y = S W = Q R``, ``H = Q^T S Q`` and ``s_i`` the normalised i-th column of ``R^-T``, which is the direction
    in the range of ``Q`` that the i-th vector alone contributes, the i-th estimate is

        tr H - s_i^T H s_i + c_i^T H c_i - 2 c_i^T r_i + w_i^T S w_i,    c_i = (I - s_i s_i^T) Q^T w_i,

    and the result their mean.  The estimates are not quite independent: the standard error is that of the paper.
    """
    count = min(samples // 2, operator.shape[0])
    omega = signs(operator, count, generator)
    image = operator @ omega
    q, r = torch.linalg.qr(image)
    if float(r.diagonal().abs().min()) <= count * torch.finfo(r.dtype).eps * float(r.diagonal().abs().max()):
        return Estimate(float((q * (operator @ q)).sum()), 0.0, samples)  # the sketch spans the range: exact
    h = q.T @ (operator @ q)
    s = torch.linalg.inv(r).T
    s = s / s.norm(dim=0)
    w = q.T @ omega
    c = w - s * (s * w).sum(0)
    draws = h.trace() - (s * (h @ s)).sum(0) + (c * (h @ c)).sum(0) - 2 * (c * r).sum(0) + (omega * image).sum(0)
    return mean_estimate(draws)


def _blocks(operator: Any, samples: int, generator: torch.Generator) -> Iterator[Tensor]:
    for start in range(0, samples, _BLOCK):
        yield signs(operator, min(_BLOCK, samples - start), generator)
