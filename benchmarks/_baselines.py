"""Published preconditioned optimizers for matrices, formula by formula: what the optimizers here are compared with.

W and G are the weight and its gradient, (m, n); t counts steps from 1; EMA(X; b): S <- b S + (1 - b) X.  Weights that
are no matrices are refused.  Nothing is fused or batched: these are for steps and losses, their cost is an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


class _MatrixOptimizer(torch.optim.Optimizer):
    """The loop over matrices: W <- (1 - lr wd) W - lr U, with U from the subclass's ``direction``."""

    def __init__(self, params: Iterable[Tensor], **defaults: Any) -> None:
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"params: needed matrices, found shape {tuple(p.shape)}")

    def direction(self, g: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        """U for a gradient; updates the state, which is empty at the first step."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = self.direction(p.grad, self.state[p], group)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        return loss


class GraftedShampoo(_MatrixOptimizer):
    """Shampoo (arXiv 1802.09568) with exponential averages, grafted to Adam (arXiv 2002.11803, 2309.06497).

        L <- EMA(G Gᵀ; b2),  R <- EMA(Gᵀ G; b2),  M <- EMA(G; b1),  V <- EMA(G∘G; b2),  each divided by 1 - bᵗ
        U = L^-p M R^-p,  scaled to the norm of Adam's M / (sqrt V + eps)

    p = 1/4 is Shampoo's own exponent, p = 1/2 that of a Kronecker-factored covariance (arXiv 2406.17748); its trace
    scaling is left out, for the graft fixes the length.  Roots are renewed every ``every`` steps, from the first on,
    with ``damping`` times the largest eigenvalue added.  With ``nesterov`` b1 M + (1 - b1) G takes the place of M in U.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.99), exponent: float = 0.5,
        damping: float = 1e-6, eps: float = 1e-8, every: int = 10, weight_decay: float = 0.0, nesterov: bool = False,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, exponent=exponent, damping=damping, eps=eps, every=every,
                         weight_decay=weight_decay, nesterov=nesterov)

    def direction(self, g: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        """U of the class."""
        b1, b2 = group["betas"]
        if not state:
            state.update(step=0, mean=torch.zeros_like(g), square=torch.zeros_like(g),
                         left=g.new_zeros(len(g), len(g)), right=g.new_zeros(g.shape[1], g.shape[1]))
        state["step"] += 1
        first, second = 1 - b1 ** state["step"], 1 - b2 ** state["step"]
        state["mean"].lerp_(g, 1 - b1)
        state["square"].lerp_(g * g, 1 - b2)
        state["left"].lerp_(g @ g.mT, 1 - b2)
        state["right"].lerp_(g.mT @ g, 1 - b2)
        if (state["step"] - 1) % group["every"] == 0:
            for side in ("left", "right"):
                state[f"{side}_root"] = inverse_root(state[side] / second, group["exponent"], group["damping"])
        mean = state["mean"] / first
        if group["nesterov"]:
            mean = state["mean"].lerp(g, 1 - b1) / (1 - b1 ** (state["step"] + 1))
        update = state["left_root"] @ mean @ state["right_root"]
        adam = mean / ((state["square"] / second).sqrt() + group["eps"])
        return update * (adam.norm() / update.norm().clamp_min(torch.finfo(g.dtype).tiny))


class SOAP(_MatrixOptimizer):
    """Adam in the eigenbasis of Shampoo (arXiv 2409.11321), as the authors' public code does it.

        G' = Q_Lᵀ G Q_R,  M' = Q_Lᵀ M Q_R with M <- EMA(G; b1),  V <- EMA(G'∘G'; b2)
        U = Q_L (M' / (sqrt V + eps)) Q_Rᵀ sqrt(1 - b2ᵗ) / (1 - b1ᵗ)

    then L <- EMA(G Gᵀ; b2), R <- EMA(Gᵀ G; b2), and every ``every`` steps Q_L <- qr(L Q_L), Q_R <- qr(R Q_R), the
    columns (and V with them) sorted by the diagonal of Qᵀ L Q before.  The first gradient only starts L, R and their
    eigenvectors: it moves nothing and enters no average.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float] = (0.95, 0.95), eps: float = 1e-8,
        every: int = 10, weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, every=every, weight_decay=weight_decay)

    def direction(self, g: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        """U of the class."""
        b1, b2 = group["betas"]
        if not state:
            left, right = (1 - b2) * g @ g.mT, (1 - b2) * g.mT @ g
            state.update(step=0, mean=torch.zeros_like(g), square=torch.zeros_like(g), left=left, right=right,
                         left_basis=eigenvectors(left), right_basis=eigenvectors(right))
            return torch.zeros_like(g)
        state["step"] += 1
        left, right = state["left_basis"], state["right_basis"]
        state["mean"].lerp_(g, 1 - b1)
        state["square"].lerp_((left.mT @ g @ right).square(), 1 - b2)
        scaled = (left.mT @ state["mean"] @ right) / (state["square"].sqrt() + group["eps"])
        correction = (1 - b2 ** state["step"]) ** 0.5 / (1 - b1 ** state["step"])
        state["left"].lerp_(g @ g.mT, 1 - b2)
        state["right"].lerp_(g.mT @ g, 1 - b2)
        if state["step"] % group["every"] == 0:
            rows, columns = (_descending(state[side], state[f"{side}_basis"]) for side in ("left", "right"))
            state["square"] = state["square"][rows][:, columns]
            state["left_basis"] = torch.linalg.qr(state["left"] @ left[:, rows]).Q
            state["right_basis"] = torch.linalg.qr(state["right"] @ right[:, columns]).Q
        return correction * (left @ scaled @ right.mT)


class KLShampoo(_MatrixOptimizer):
    """KL-Shampoo (arXiv 2509.03378), after the authors' public code, in float32.

        U = Q_A ((Q_Aᵀ M Q_B) ∘ (d_A d_Bᵀ)^-1/2) Q_Bᵀ,  M <- EMA(G; b1)
        A <- EMA(G Q_B d_B^-1 Q_Bᵀ Gᵀ / n; b2),  d_A <- EMA(mean over j of P_ij² / d_B,j; b2),  P = Q_Aᵀ G Q_B

    and the same for B, d_B from A, d_A before the step; every ``every`` steps Q_A <- qr(A Q_A), Q_B <- qr(B Q_B).
    The first gradient only starts A, B, their eigenvectors and d = 0.1; d^-1/2 is at most max(10, min(size, 4000)).
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float] = (0.95, 0.95), every: int = 10,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, every=every, weight_decay=weight_decay)

    def direction(self, g: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        """U of the class."""
        b1, b2 = group["betas"]
        m, n = g.shape
        if not state:
            left, right = (1 - b2) / n * g @ g.mT, (1 - b2) / m * g.mT @ g
            state.update(step=0, mean=torch.zeros_like(g), left=left, right=right, left_values=g.new_full((m,), 0.1),
                         right_values=g.new_full((n,), 0.1), left_basis=eigenvectors(left),
                         right_basis=eigenvectors(right))
            return torch.zeros_like(g)
        state["step"] += 1
        left, right = state["left_basis"], state["right_basis"]
        a, b = (_bounded_inverse(state[f"{side}_values"]) for side in ("left", "right"))
        state["mean"].lerp_(g, 1 - b1)
        projected = left.mT @ g @ right
        half_left, half_right = left.mT @ g * a[:, None], g @ right * b
        update = left @ ((left.mT @ state["mean"] @ right) * a[:, None] * b) @ right.mT
        state["left"].lerp_(half_right @ half_right.mT / n, 1 - b2)
        state["right"].lerp_(half_left.mT @ half_left / m, 1 - b2)
        state["left_values"].lerp_((projected * b).square().mean(1), 1 - b2)
        state["right_values"].lerp_((projected * a[:, None]).square().mean(0), 1 - b2)
        if state["step"] % group["every"] == 0:
            for side in ("left", "right"):
                state[f"{side}_basis"] = torch.linalg.qr(state[side] @ state[f"{side}_basis"]).Q
        return update


def inverse_root(matrix: Tensor, exponent: float, damping: float) -> Tensor:
    """(S + damping λ_max I)^-exponent of a positive semi-definite matrix; negative eigenvalues count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0)
    values = (values + damping * values[-1]).clamp_min(torch.finfo(values.dtype).tiny)
    return (vectors * values.pow(-exponent)) @ vectors.mT


def eigenvectors(matrix: Tensor) -> Tensor:
    """Those of a symmetric matrix, the largest eigenvalue first."""
    return torch.linalg.eigh(matrix).eigenvectors.flip(-1)


def _descending(matrix: Tensor, basis: Tensor) -> Tensor:
    """The order of the columns of ``basis`` by the diagonal of basisᵀ S basis, descending."""
    return (basis * (matrix @ basis)).sum(0).argsort(descending=True)


def _bounded_inverse(values: Tensor) -> Tensor:
    """d^-1/2, at most max(10, min(size, 4000))."""
    return values.clamp_min(0).rsqrt().clamp_max(max(10.0, min(float(len(values)), 4000.0)))
