"""A vision transformer small enough to train by the dozen on one CPU core.

Every operation is a plain matrix product, softmax, GELU or layer norm, so that the model computes in the dtype of its
parameters and has second derivatives: ``jvp`` of ``grad`` and ``grad`` of ``grad`` (in torch 2.13 the reverse
derivative of a ``jvp`` through ``layer_norm`` is silently wrong; so is any model's that has one).
"""

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q kᵀ / sqrt(d_h)) v per head, written with plain products.

    With ``causal`` every token attends to itself and those before it only.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.causal = heads, causal
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)  # (..., T, H d) -> (..., H, T, d)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # (..., H, T, T)
        if self.causal:
            scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=x.dtype, device=x.device).triu(1)
        mixed = scores.softmax(-1) @ value
        merged: Tensor = self.output(mixed.transpose(-3, -2).flatten(-2))
        return merged


class MLP(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        lowered: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return lowered


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, hidden: int, causal: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class TinyViT(nn.Module):
    """Classifier of square one-channel images cut into square patches.

        logits = head(norm(mean over tokens of blocks(embed(patches) + position)))

    Args:
        image_size: side of the images; a multiple of ``patch_size``.
        patch_size: side of a patch; there are ``(image_size / patch_size)²`` tokens.
        width: size of the residual stream; a multiple of ``heads``.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_width: hidden size of the MLPs.
        classes: number of logits.
        init_scale: factor on the initial weights of every linear layer (not on biases and positions).
        generator: source of the initial values; seed 0 when it is None.

    Raises:
        ValueError: a size is not positive, or does not divide as stated above.

    >>> TinyViT()(torch.zeros(5, 8, 8)).shape
    torch.Size([5, 10])
    >>> sum(p.numel() for p in TinyViT().parameters())
    18154
    """

    def __init__(
        self,
        *,
        image_size: int = 8,
        patch_size: int = 2,
        width: int = 32,
        depth: int = 2,
        heads: int = 4,
        mlp_width: int = 64,
        classes: int = 10,
        init_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"image_size": image_size, "patch_size": patch_size, "width": width, "depth": depth}
        _check_positive(sizes | {"heads": heads, "mlp_width": mlp_width, "classes": classes})
        _check_multiple("image_size", image_size, "patch_size", patch_size)
        _check_multiple("width", width, "heads", heads)
        self.image_size, self.patch_size = image_size, patch_size
        self.embed = nn.Linear(patch_size**2, width)
        self.position = nn.Parameter(torch.zeros((image_size // patch_size) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.reset(init_scale, generator)

    @torch.no_grad()
    def reset(self, init_scale: float = 1.0, generator: torch.Generator | None = None) -> None:
        """Draw initial values: uniform ±1/sqrt(fan-in), weights times ``init_scale``; positions N(0, 0.02²)."""
        generator = generator or torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                module.weight.uniform_(-bound, bound, generator=generator).mul_(init_scale)
                module.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self.position.normal_(0.0, 0.02, generator=generator)

    def patches(self, images: Tensor) -> Tensor:
        """Cut images (B, S, S) or (B, 1, S, S) into rows of pixels, (B, tokens, patch_size²)."""
        size = (self.image_size, self.image_size)
        if images.shape[1:] not in (size, (1, *size)):
            raise ValueError(
                f"images: needed shape (batch, {size[0]}, {size[1]}) or (batch, 1, {size[0]}, {size[1]}), "
                f"found {tuple(images.shape)}"
            )
        images = images.reshape(-1, *size)
        tiles = images.unfold(1, self.patch_size, self.patch_size).unfold(2, self.patch_size, self.patch_size)
        return tiles.flatten(3).flatten(1, 2)  # (B, S/p, S/p, p, p) -> (B, tokens, p²)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(self.patches(images)) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x.mean(-2)))
        return logits


def _check_positive(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: needed a positive size, found {size}")


def _check_multiple(name: str, size: int, divisor_name: str, divisor: int) -> None:
    if size % divisor:
        raise ValueError(f"{name}: needed a multiple of {divisor_name} = {divisor}, found {size}")
