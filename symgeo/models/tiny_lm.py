"""A decoder-only language model small enough to train by the dozen on one CPU core.

Like :mod:`symgeo.models.tiny_vit` it is made of plain matrix products, softmax, GELU and layer norm, and computes in
the dtype of its parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from symgeo.models.tiny_vit import Block


class CausalBlock(Block):
    """A block of :mod:`symgeo.models.tiny_vit` whose attention looks at this token and those before it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__(width, heads, hidden, causal=True)


class TinyLM(nn.Module):
    """Predicts the next symbol at every position.

        logits = head(norm(blocks(embed[symbols] + position)))

    Args:
        vocabulary: number of symbols.
        context: the longest sequence it reads.
        width: size of the residual stream; a multiple of ``heads``.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_width: hidden size of the MLPs.
        tie: whether head and embedding are one parameter; the head then has no bias.
        generator: source of the initial values; seed 0 when it is None.

    Raises:
        ValueError: a size is not positive, or ``width`` is no multiple of ``heads``.

    >>> TinyLM()(torch.zeros(5, 64, dtype=torch.int64)).shape
    torch.Size([5, 64, 96])
    >>> sum(p.numel() for p in TinyLM().parameters())
    429664
    """

    def __init__(
        self,
        *,
        vocabulary: int = 96,
        context: int = 64,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        mlp_width: int = 512,
        tie: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "context": context, "width": width, "depth": depth, "heads": heads}
        for name, size in (sizes | {"mlp_width": mlp_width}).items():
            if size < 1:
                raise ValueError(f"{name}: needed a positive size, found {size}")
        if width % heads:
            raise ValueError(f"width: needed a multiple of heads = {heads}, found {width}")
        self.context = context
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(CausalBlock(width, heads, mlp_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=not tie)
        if tie:
            self.head.weight = self.embed.weight
        self.reset(generator)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw initial values: uniform ±1/sqrt(fan-in) for linear maps; embeddings and positions N(0, 0.02²)."""
        generator = generator or torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                for parameter in module.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self.embed.weight.normal_(0.0, 0.02, generator=generator)  # after the head, which may share it
        self.position.normal_(0.0, 0.02, generator=generator)

    def forward(self, symbols: Tensor) -> Tensor:
        """Logits (..., T, vocabulary) of the symbol after each of ``symbols`` (..., T), integers, T <= context.

        Raises:
            ValueError: a sequence is longer than ``context``.
        """
        length = symbols.shape[-1]
        if length > self.context:
            raise ValueError(f"symbols: needed at most context = {self.context} per sequence, found {length}")
        x = self.embed(symbols) + self.position[:length]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
