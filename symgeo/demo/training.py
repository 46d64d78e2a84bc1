"""Training one small vision transformer on the digits, and the settings that make the models differ."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from symgeo.data import Digits
from symgeo.models.tiny_vit import TinyViT

Params = dict[str, Tensor]

GATE = 0.98  # least train accuracy of a model that counts


@dataclass(frozen=True)
class Setting:
    """What one model is trained with; ``seed`` decides its initial values and the order of its batches."""

    lr: float
    weight_decay: float
    init_scale: float
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Recipe:
    """A list of settings, and what their models have in common: steps, training images, the split's seed."""

    settings: tuple[Setting, ...]
    steps: int = 600
    train: int = 400
    split_seed: int = 0


def grid(
    lrs: tuple[float, ...] = (2e-3, 5e-3, 1e-2),
    weight_decays: tuple[float, ...] = (0.0, 1.0),
    init_scales: tuple[float, ...] = (1.0, 2.5),
    batch_sizes: tuple[int, ...] = (32, 64),
    seed: int = 0,
) -> tuple[Setting, ...]:
    """All combinations of the values, 24 of them by default; setting i has the seed ``1000 seed + i``."""
    combinations = product(lrs, weight_decays, init_scales, batch_sizes)
    return tuple(Setting(*values, seed=1000 * seed + i) for i, values in enumerate(combinations))


def full(seed: int = 0) -> Recipe:
    """The 24 models of the demo, 600 steps each."""
    return Recipe(grid(seed=seed), split_seed=seed)


def quick(seed: int = 0) -> Recipe:
    """Six models, 350 steps each: enough to see every part of the demo work, too few to conclude from."""
    settings = grid(lrs=(5e-3,), weight_decays=(0.0, 0.3, 1.0), batch_sizes=(64,), seed=seed)
    return Recipe(settings, steps=350, split_seed=seed)


def train(setting: Setting, data: Digits, steps: int = 600) -> Params:
    """Train a ``TinyViT``: AdamW with a one-cycle learning rate, cross-entropy, no augmentation.

    Returns:
        The trained parameters, float32, by name.

    Raises:
        ValueError: ``steps`` is below 2, or the loss stopped being finite.
    """
    if steps < 2:
        raise ValueError(f"steps: needed at least 2, found {steps}")
    generator = torch.Generator().manual_seed(setting.seed)
    model = TinyViT(init_scale=setting.init_scale, generator=generator)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.lr, weight_decay=setting.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=setting.lr, total_steps=steps)
    for chosen in _batch_indices(len(data.train_labels), setting.batch_size, steps, generator):
        optimizer.zero_grad()
        cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    params = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if not all(value.isfinite().all() for value in params.values()):
        raise ValueError(f"setting: training diverged to parameters that are not finite with {setting}")
    return params


def _batch_indices(n: int, size: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """``steps`` batches of indices; every epoch has a new order, and drops the remainder of a batch."""
    chosen: list[Tensor] = []
    while len(chosen) < steps:
        order = torch.randperm(n, generator=generator)
        chosen += order[: n - n % min(size, n)].split(min(size, n))
    return chosen[:steps]


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy and accuracy on both sides of the split."""

    train_loss: float
    test_loss: float
    train_accuracy: float
    test_accuracy: float

    @property
    def error_gap(self) -> float:
        """Test error minus train error."""
        return self.train_accuracy - self.test_accuracy

    @property
    def loss_gap(self) -> float:
        """Test loss minus train loss."""
        return self.test_loss - self.train_loss

    @property
    def excluded(self) -> bool:
        """Whether the model was not trained to the end: its sharpness says nothing about generalization."""
        return self.train_accuracy < GATE


@torch.no_grad()
def evaluate(params: Params, data: Digits) -> Metrics:
    """Loss and accuracy of a ``TinyViT`` with these parameters on the whole split."""
    model = TinyViT()

    def measure(images: Tensor, labels: Tensor) -> tuple[float, float]:
        logits = torch.func.functional_call(model, params, (images,))
        correct = (logits.argmax(-1) == labels).double().mean()
        return float(cross_entropy(logits, labels)), float(correct)

    train_loss, train_accuracy = measure(data.train_images, data.train_labels)
    test_loss, test_accuracy = measure(data.test_images, data.test_labels)
    return Metrics(train_loss, test_loss, train_accuracy, test_accuracy)
