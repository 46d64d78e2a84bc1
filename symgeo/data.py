"""Small data sets that need no download, as plain tensors."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
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


def digit_batches(size: int = 128) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The split of :func:`digits`, in batches: ``{"train": batches, "test": batches}``.

    On the command line it is the data of any model of 8 x 8 images with ten classes, such as ``TinyViT``:
    ``--data symgeo.data:digit_batches``.

    Args:
        size: images in a batch; the last batch of either side may be smaller.

    Raises:
        ImportError: scikit-learn, whose wheel carries the images, is not installed.
        ValueError: ``size`` is not positive.

    >>> {side: len(listed) for side, listed in digit_batches().items()}
    {'train': 4, 'test': 11}
    """
    data = digits()
    return {
        "train": batches(data.train_images, data.train_labels, size),
        "test": batches(data.test_images, data.test_labels, size),
    }


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


SYMBOLS = "\n" + "".join(map(chr, range(32, 127)))  # the 96 symbols of `Text`, by number


class Text(NamedTuple):
    """Characters as numbers of ``SYMBOLS``, uint8: train (n,), validation (m,), from different files."""

    train: Tensor
    validation: Tensor

    def batches(self, seed: int, steps: int, batch: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``steps`` pairs (symbols, the symbol after each), both (batch, context), int64, drawn uniformly.

        The seed and the sizes decide every batch.  Raises ``ValueError`` where a size is not positive or the text
        is too short.
        """
        generator = torch.Generator().manual_seed(seed)
        places = _places(self.train, "train", context)
        for name, size in {"steps": steps, "batch": batch}.items():
            if size < 1:
                raise ValueError(f"{name}: needed at least 1, found {size}")
        for starts in torch.randint(0, places, (steps, batch), generator=generator):
            yield _windows(self.train, starts, context)

    def examples(self, count: int, context: int) -> tuple[Tensor, Tensor]:
        """``count`` fixed windows of the validation text, evenly spaced: as one of ``batches``.

        Raises ``ValueError`` where a size is not positive or the text is too short.
        """
        places = _places(self.validation, "validation", context)
        if not 1 <= count <= places:
            raise ValueError(f"count: needed 1 to {places} windows, found {count}")
        return _windows(self.validation, torch.arange(count) * places // count, context)

    def digest(self) -> str:
        """Sixteen hexadecimal digits that tell one text from another."""
        return hashlib.sha256(bytes(self.train.tolist()) + b"\n" + bytes(self.validation.tolist())).hexdigest()[:16]


def python_source(folder: Path | None = None, every: int = 11) -> Text:
    """The source of Python's own standard library, one symbol per character: about 4 MB, differing by version.

    The files ``*.py`` of ``folder`` (the standard library of this interpreter when None; its packages are left
    out) in the order of their names, the ``every``-th of them for validation.  A tab becomes a space, any other
    character outside ``SYMBOLS`` a question mark.

    Raises:
        ValueError: ``every`` is below 2, or there are fewer than ``every`` files, as where Python came without
            its sources.
    """
    if every < 2:
        raise ValueError(f"every: needed at least 2, found {every}")
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    files = sorted(folder.glob("*.py"))
    if len(files) < every:
        raise ValueError(
            f"folder: needed at least every = {every} files *.py in {folder}, found {len(files)}; give a folder with "
            "sources if this Python came without its own"
        )
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    validation = texts[every - 1 :: every]
    train = [text for number, text in enumerate(texts, start=1) if number % every]
    return Text(_encode("".join(train)), _encode("".join(validation)))


def _encode(text: str) -> Tensor:
    numbers = torch.full((256,), SYMBOLS.index("?"), dtype=torch.uint8)
    numbers[[ord(symbol) for symbol in SYMBOLS]] = torch.arange(len(SYMBOLS), dtype=torch.uint8)
    numbers[ord("\t")] = SYMBOLS.index(" ")
    codes = bytearray(text.encode("ascii", "replace"))
    return numbers[torch.frombuffer(codes, dtype=torch.uint8).long()] if codes else numbers[:0]


def _places(text: Tensor, name: str, context: int) -> int:
    """The number of windows of ``context`` symbols that have a next one."""
    if context < 1:
        raise ValueError(f"context: needed at least 1, found {context}")
    if len(text) <= context:
        raise ValueError(f"{name}: needed more than context = {context} symbols, found {len(text)}")
    return len(text) - context


def _windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]
