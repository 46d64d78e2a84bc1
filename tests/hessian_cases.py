"""Small float64 models for the tests of Hessians, and dense oracles that share no code with the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from networks import randomise
from torch import Tensor, nn

from symgeo import Symmetry
from symgeo.functional import Loss, Params
from symgeo.groups import GeneralLinear, Permutation, Rotary


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


class Attention(nn.Module):
    """One head, softmax(x q (x k)^T / sqrt h) x v, with a layer norm before it."""

    def __init__(self, width: int = 5, head: int = 3, out: int = 2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k = (nn.Parameter(torch.zeros(width, head)) for _ in range(2))
        self.v = nn.Parameter(torch.zeros(width, out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        scores = x @ self.q @ (x @ self.k).transpose(-1, -2) / math.sqrt(self.q.shape[1])
        return scores.softmax(-1) @ x @ self.v


class GroupedBlock(nn.Module):
    """A block of the LLaMA kind: RMS norms, rotary grouped-query attention, SwiGLU; everything in float64."""

    SYMMETRY = Symmetry(
        {"q": "(K G e*) _", "k": "(K e) _", "v": "(K f) _", "o": "_ (K G f*)"},
        {"K": Permutation(), "e": Rotary(per="K"), "f": GeneralLinear(per="K")}, sizes={"K": 2, "G": 2},
    )

    def __init__(self, width: int = 5, key: int = 4, value: int = 3, hidden: int = 7) -> None:
        super().__init__()
        self.key, self.value = key, value
        shapes = {"q": (4 * key, width), "k": (2 * key, width), "v": (2 * value, width), "o": (width, 4 * value),
                  "gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)

    def _rotated(self, x: Tensor) -> Tensor:
        half = self.key // 2
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.3], dtype=x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q = self._rotated((y @ self.q.T).unflatten(-1, (2, 2, self.key)).movedim(-4, -2))  # (B, K, G, T, e)
        k = self._rotated((y @ self.k.T).unflatten(-1, (2, self.key)).movedim(-3, -2)).unsqueeze(-3)
        v = (y @ self.v.T).unflatten(-1, (2, self.value)).movedim(-3, -2).unsqueeze(-3)
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(self.key)).softmax(-1) @ v
        x = x + mixed.movedim(-2, -4).flatten(-3) @ self.o.T
        y = self.norm2(x)
        return x + (nn.functional.silu(y @ self.gate.T) * (y @ self.up.T)) @ self.down.T


def seeded(build: Callable[[], nn.Module], seed: int, size: float) -> nn.Module:
    """The model with initial values and noise from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise(build(), seed, size)


def mlp(seed: int = 0, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 2)), seed, 0.5)


def attention(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The tiny attention and two batches for squared error."""
    return seeded(Attention, seed, 0.7), [(normal(3, 4, 5, seed=10 + i), normal(3, 4, 2, seed=20 + i))
                                               for i in range(2)]


def transformer_block(name: str) -> tuple[nn.Module, Symmetry, list[tuple[Tensor, Tensor]]]:
    """A BERT-like or a grouped-query block with its symmetry and a batch for squared error."""
    if name == "bert":
        from symgeo import find_symmetry

        build = lambda: nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0, activation="gelu", batch_first=True)  # noqa: E731
        model = seeded(build, 1, 0.4)
        return model, find_symmetry(model), [(normal(3, 5, 6, seed=3), normal(3, 5, 6, seed=4))]
    model = seeded(GroupedBlock, 1, 0.5)
    return model, GroupedBlock.SYMMETRY, [(normal(3, 5, 5, seed=3), normal(3, 5, 5, seed=4))]


def orbit(symmetry: Symmetry, params: Params, seed: int = 7) -> Params:
    """The parameters moved by a random element of the GL and rotary groups."""
    action = symmetry.bind(params)
    names = [name for name, group in action.groups.items() if isinstance(group, (GeneralLinear, Rotary))]
    return action.act(action.random(generator(seed), only=names), params)


def flat(params: Params) -> Tensor:
    return torch.cat([p.reshape(-1) for p in params.values()])


def unflat(x: Tensor, like: Params) -> Params:
    sizes = [p.numel() for p in like.values()]
    return {name: piece.reshape(p.shape) for (name, p), piece in zip(like.items(), x.split(sizes))}


def mean_loss(loss: Loss, params: Params, batches: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """The mean loss as a function of the flat vector."""
    return lambda x: sum(loss(unflat(x, params), batch) for batch in batches) / len(batches)


def dense_hessian(loss: Loss, params: Params, batches: Sequence[Any]) -> Tensor:
    """By two reverse passes of classic autograd."""
    return torch.autograd.functional.hessian(mean_loss(loss, params, batches), flat(params))


def dense_gradient(loss: Loss, params: Params, batches: Sequence[Any]) -> Tensor:
    x = flat(params).requires_grad_()
    return torch.autograd.grad(mean_loss(loss, params, batches)(x), x)[0]


def christoffel_of(metric: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gamma^k_ij, from all derivatives of the dense metric: the textbook formula."""
    g, dg = metric(x), torch.autograd.functional.jacobian(metric, x)  # dg[i, j, k] = d_k G_ij
    lowered = 0.5 * (torch.einsum("jki->kij", dg) + torch.einsum("ikj->kij", dg) - torch.einsum("ijk->kij", dg))
    return torch.einsum("lk,kij->lij", torch.linalg.inv(g), lowered)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the maximum norm."""
    return float((found - expected).abs().max() / expected.abs().max())

