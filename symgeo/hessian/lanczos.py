"""The Lanczos recurrence on several starting vectors at once, and the quadrature rules that it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: numbers that the basis for reorthogonalisation may take; beyond, the recurrence goes on without
_BASIS = 2**27


class Quadrature(NamedTuple):
    """``v^T f(S) v = sum_j weights_j f(nodes_j)`` for each starting vector: both ``(probes, nodes)``, in float64."""

    nodes: Tensor
    weights: Tensor


@dataclass(frozen=True)
class SpectralDensity:
    """A smoothed density of eigenvalues: its integral is 1, times d the number of eigenvalues.

    grid, density, stderr : ``(points,)``, the last the standard error over probes, and the error of the quadrature
    width : standard deviation of the smoothing normal;  nodes, weights : the raw quadrature, ``(probes, steps)``
    products, converged : as of `Estimate`, the tolerance one of the integral of the error
    """

    grid: Tensor
    density: Tensor
    stderr: Tensor
    width: float
    nodes: Tensor
    weights: Tensor
    products: int = 0
    converged: bool | None = None


class Jacobi(NamedTuple):
    """The tridiagonal matrices ``T`` of the recurrence: alphas, betas ``(probes, steps)``, in float64.

    The last beta is the size of what comes after the last step.
    """

    alphas: Tensor
    betas: Tensor

    @property
    def steps(self) -> int:
        """The order of ``T``."""
        return self.alphas.shape[-1]

    def cut(self, steps: int) -> Jacobi:
        """What there was after fewer steps."""
        return Jacobi(self.alphas[:, :steps], self.betas[:, :steps])

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Ritz values ``(probes, steps)`` and the eigenvectors of ``T``."""
        from scipy.linalg import eigh_tridiagonal

        if not bool(torch.isfinite(self.alphas + self.betas).all()):
            raise ValueError("Lanczos: the products with the operator are not finite")
        found = [eigh_tridiagonal(a, b[:-1]) for a, b in zip(self.alphas.cpu().numpy(), self.betas.cpu().numpy())]
        nodes, vectors = (torch.stack([torch.from_numpy(x) for x in part]) for part in zip(*found))
        return nodes.to(self.alphas.device), vectors.to(self.alphas.device)

    def gauss(self) -> Quadrature:
        """The rule of Gauss, exact for polynomials of degree ``2 steps - 1``."""
        nodes, vectors = self.eigh()
        return Quadrature(nodes, vectors[:, 0].square())

    def radau(self, node: float, ritz: tuple[Tensor, Tensor] | None = None) -> Quadrature:
        """The rule of Gauss and Radau, with one more node at ``node`` (Golub 1973); ritz: what `eigh` gave.

        Of all measures with these moments none has less mass below ``node``, and none has more up to it, than this
        rule (Chebyshev, Markov, Stieltjes).
        """
        nodes, vectors = self.eigh() if ritz is None else ritz
        gap = nodes - node
        gap = torch.where(gap == 0, torch.finfo(gap.dtype).tiny ** 0.5, gap)
        last = node + self.betas[:, -1:].square() * (vectors[:, -1].square() / gap).sum(-1, keepdim=True)
        return Jacobi(torch.cat([self.alphas, last], -1), torch.nn.functional.pad(self.betas, (0, 1))).gauss()


class Recurrence:
    """Lanczos on the unit vectors along the columns of ``start (d, probes)``.

    While they fit, all vectors are kept, and every new one is orthogonalised against them, twice where that takes much
    of it away, so that no spurious copies of eigenvalues appear.  Beyond that the three-term recurrence goes on alone:
    copies share the weight of what they are copies of, which quadrature does not mind.  A probe whose Krylov space is
    exhausted keeps its exact rule: further nodes have weight 0.
    """

    def __init__(self, operator: Any, start: Tensor):
        self.operator = operator
        self.q = start / start.norm(dim=0)
        self.previous = torch.zeros_like(self.q)
        self.beta = torch.zeros(start.shape[1], dtype=start.dtype, device=start.device)
        self.basis: Tensor | None = self.q.new_empty(start.shape[1], 0, start.shape[0])  # (probes, steps, d)
        self.alphas: list[Tensor] = []
        self.betas: list[Tensor] = []
        self.scale = 0.0

    @property
    def jacobi(self) -> Jacobi:
        """The matrices so far."""
        return Jacobi(torch.stack(self.alphas, -1), torch.stack(self.betas, -1))

    @property
    def exhausted(self) -> bool:
        """Whether every rule is exact."""
        return bool(self.betas) and not bool(self.betas[-1].any())

    def extend(self, steps: int) -> None:
        """Go on to so many steps, at most d; a product with all probes for each."""
        steps, done = min(steps, len(self.q)), len(self.alphas)
        if self.basis is not None and steps > done:
            kept, self.basis = self.basis, None
            if steps * self.q.numel() <= _BASIS:
                self.basis = self.q.new_empty(kept.shape[0], steps, kept.shape[2])
                self.basis[:, :done] = kept
        for _ in range(done, steps):
            self._step()

    def _step(self) -> None:
        done = len(self.alphas)
        image = self.operator @ self.q
        alpha = (self.q * image).sum(0)
        image = image - alpha * self.q - self.beta * self.previous
        if self.basis is not None:
            self.basis[:, done] = self.q.T
            kept = self.basis[:, :done + 1]
            for _ in range(2):
                before = image.norm(dim=0)
                # one by one: faster than batched products, which copy
                parts = [old.T.mv(old.mv(column)) for old, column in zip(kept, image.unbind(1))]
                image = image - torch.stack(parts, 1)
                if bool((image.norm(dim=0) > 0.7 * before).all()):
                    break
        beta = image.norm(dim=0)
        self.scale = max(self.scale, float(alpha.abs().max()), float(beta.max()))
        alive = beta > 1e3 * len(self.q) ** 0.5 * torch.finfo(beta.dtype).eps * self.scale
        self.beta = torch.where(alive, beta, 0.0)
        self.previous, self.q = self.q, torch.where(alive, image / torch.where(alive, beta, 1.0), 0.0)
        self.alphas.append(alpha.double())
        self.betas.append(self.beta.double())


def lanczos(operator: Any, start: Tensor, steps: int) -> Quadrature:
    """The Gauss quadratures of the unit vectors along the columns of ``start (d, probes)``; see `Recurrence`."""
    run = Recurrence(operator, start)
    run.extend(steps)
    return run.jacobi.gauss()
