"""Small data sets that need no download, as plain tensors."""

from typing import NamedTuple

import torch
from torch import Tensor


class Digits(NamedTuple):
    """A split of the 1797 handwritten digits: images (n, 8, 8) in [0, 1], float32; labels (n,), int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(train: int = 400, seed: int = 0) -> Digits:
    """Split the digits of scikit-learn into ``train`` training images and the rest for testing.

    Args:
        train: number of training images, at least 1 and fewer than all of them (1797).
        seed: decides which images are trained on; the same seed gives the same split.

    Raises:
        ImportError: scikit-learn, whose wheel carries the images, is not installed.
        ValueError: ``train`` leaves no image on one side.
    """
    images, labels = _load()
    if not 1 <= train < len(labels):
        raise ValueError(f"train: needed 1 to {len(labels) - 1} images, found {train}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen, rest = order[:train], order[train:]
    return Digits(images[chosen], labels[chosen], images[rest], labels[rest])


def _load() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed: pip install 'symgeo[demo]'"
        ) from error
    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32) / 16  # pixels are counts from 0 to 16
    return images, torch.as_tensor(bunch.target, dtype=torch.int64)


def batches(x: Tensor, y: Tensor, size: int, count: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Cut (x, y) into consecutive batches of ``size``; the last may be smaller.

    Args:
        count: keep only the first ``count`` batches; all of them when None.

    Raises:
        ValueError: the lengths of x and y differ, or ``size`` or ``count`` is not positive.

    >>> [len(y) for _, y in batches(torch.zeros(7, 2), torch.zeros(7), size=3)]
    [3, 3, 1]
    """
    if len(x) != len(y):
        raise ValueError(f"y: needed one entry for each of the {len(x)} rows of x, found {len(y)}")
    if size < 1:
        raise ValueError(f"size: needed at least 1, found {size}")
    if count is not None and count < 1:
        raise ValueError(f"count: needed at least 1 or None, found {count}")
    return list(zip(x.split(size), y.split(size)))[:count]
