"""Lanczos with full reorthogonalisation on many starting vectors at once, and what its quadrature gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifolds.linalg import eigh
from symgeo.hessian.estimate import Estimate, mean_estimate
from symgeo.hessian.traces import signs
from symgeo.sharpness.result import check_count


class Quadrature(NamedTuple):
    """``v^T f(S) v = sum_j weights_j f(nodes_j)`` for each starting vector: both ``(probes, steps)``, in float64."""

    nodes: Tensor
    weights: Tensor


@dataclass(frozen=True)
class SpectralDensity:
    """A smoothed density of eigenvalues: its integral is 1, times d the number of eigenvalues.

    grid, density, stderr : ``(points,)``, the last the standard error over probes
    width : standard deviation of the smoothing normal;  nodes, weights : the raw quadrature, ``(probes, steps)``
    """

    grid: Tensor
    density: Tensor
    stderr: Tensor
    width: float
    nodes: Tensor
    weights: Tensor


def lanczos(operator: Any, start: Tensor, steps: int) -> Quadrature:
    """The Gauss quadratures of the unit vectors along the columns of ``start (d, probes)``.

    Every new vector is orthogonalised twice against all before it, so that no spurious copies of eigenvalues appear.
    A probe whose Krylov space is exhausted keeps its exact quadrature: further nodes have weight 0.
    """
    steps = min(steps, start.shape[0])
    q = start / start.norm(dim=0)
    basis, alphas, betas = [q], [], []
    scale = torch.zeros((), dtype=torch.float64, device=start.device)
    for step in range(steps):
        image = operator @ basis[-1]
        alphas.append((basis[-1] * image).sum(0).double())
        if step == steps - 1:
            break
        stack = torch.stack(basis)  # (step + 1, d, probes)
        for _ in range(2):
            image = image - torch.einsum("sdp,sp->dp", stack, torch.einsum("sdp,dp->sp", stack, image))
        beta = image.norm(dim=0)
        scale = torch.maximum(scale, torch.maximum(alphas[-1].abs().max(), beta.double().max()))
        alive = beta.double() > 1e3 * start.shape[0] ** 0.5 * torch.finfo(start.dtype).eps * scale
        betas.append(torch.where(alive, beta, 0.0).double())
        basis.append(torch.where(alive, image / torch.where(alive, beta, 1.0), 0.0))
    matrix = torch.diag_embed(torch.stack(alphas, -1))
    if betas:
        off = torch.stack(betas, -1)
        matrix = matrix + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    nodes, vectors = eigh(matrix)
    return Quadrature(nodes, vectors[..., 0, :].square())


def trace_of(operator: Any, function: Callable[[Tensor], Tensor], samples: int, steps: int, seed: int) -> Estimate:
    """``tr f(S)`` by stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017), with its standard error over probes.

    The error counts the random probes, not the quadrature, which is exact for polynomials of degree ``2 steps - 1``.
    """
    quadrature = _probe(operator, samples, steps, seed)
    used = quadrature.weights > torch.finfo(torch.float64).eps
    terms = torch.where(used, quadrature.weights * function(torch.where(used, quadrature.nodes, 1.0)), 0.0)
    return mean_estimate(operator.shape[0] * terms.sum(-1))


def density(operator: Any, samples: int, steps: int, points: int, width: float | None, seed: int) -> SpectralDensity:
    """The smoothed spectral density; the default width is a hundredth of the range of the nodes."""
    quadrature = _probe(operator, samples, steps, seed)
    check_count("points", points)
    used = quadrature.weights > torch.finfo(torch.float64).eps
    low, high = (float(end) for end in torch.aminmax(quadrature.nodes[used]))
    scale = max(abs(low), abs(high), torch.finfo(torch.float64).tiny)
    if width is None:
        width = max(high - low, 1e-6 * scale) / 100
    if not width > 0:
        raise ValueError(f"width must be positive; got {width}")
    grid = torch.linspace(low - 5 * width, high + 5 * width, points, dtype=torch.float64, device=operator.device)
    bumps = ((grid[:, None, None] - quadrature.nodes) / width).square().mul(-0.5).exp()
    per_probe = (quadrature.weights * bumps).sum(-1) / (width * math.sqrt(2 * math.pi))  # (points, probes)
    spread = per_probe.std(-1) if samples > 1 else torch.full_like(grid, torch.inf)
    return SpectralDensity(grid, per_probe.mean(-1), spread / math.sqrt(samples), width, *quadrature)


def _probe(operator: Any, samples: int, steps: int, seed: int) -> Quadrature:
    check_count("samples", samples)
    check_count("steps", steps)
    return lanczos(operator, signs(operator, samples, torch.Generator().manual_seed(seed)), steps)
