"""Digits seen through four mild shifts, and a transformer that has seen none of them, for `merge_lora.py`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from _training import train
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from symgeo.data import Digits
from symgeo.models.tiny_vit import TinyViT


def warp(images: Tensor, angle: float = 0.0, zoom: float = 1.0) -> Tensor:
    """Images (n, 8, 8) turned by an angle in degrees and enlarged by a factor, bilinearly."""
    cosine, sine = math.cos(math.radians(angle)) / zoom, math.sin(math.radians(angle)) / zoom
    matrix = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]]).expand(len(images), 2, 3)
    grid = affine_grid(matrix, [len(images), 1, 8, 8], align_corners=False)
    return grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def noisy(images: Tensor) -> Tensor:
    """Normal noise of standard deviation 0.3, the same at every call."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 0.3 * noise).clamp(0, 1)


# compatible with each other: one model can do well on all four, so that a merge has something to reach
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda images: warp(images, angle=-20),
    "enlarged": lambda images: warp(images, zoom=1.33),
    "blurred": lambda images: avg_pool2d(images[:, None], 3, 1, 1)[:, 0],
    "noisy": noisy,
}


def pretrained(data: Digits, steps: int, seed: int) -> TinyViT:
    """A transformer trained on the digits as they are."""
    model = TinyViT(generator=torch.Generator().manual_seed(seed))
    train(model, data.train_images, data.train_labels, steps, 5e-3, seed)
    return model.requires_grad_(False).eval()
