"""One training loop for the small networks of the examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def train(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, lr: float, seed: int, weight_decay: float = 0.1
) -> None:
    """AdamW with a one-cycle rate on whatever parameters of the model require gradients; batches of 64."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in range(steps):
        batch = torch.randint(0, len(labels), (64,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
