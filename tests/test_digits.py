"""The digits and the batches."""

import sys

import pytest
import torch

from symgeo.batches import load_batches, load_splits
from symgeo.data import batches, digit_batches, digits


def test_split_is_whole_and_scaled() -> None:
    data = digits(train=400, seed=0)
    assert data.train_images.shape == (400, 8, 8)
    assert data.test_images.shape == (1397, 8, 8)
    assert data.train_images.dtype == torch.float32
    assert data.train_labels.dtype == torch.int64
    assert data.train_images.min() == 0
    assert data.train_images.max() == 1
    assert set(data.train_labels.tolist()) == set(range(10))


def test_train_and_test_are_one_permutation_of_all_images() -> None:
    first, second = digits(train=400, seed=0), digits(train=900, seed=3)

    def everything(data: tuple[torch.Tensor, ...]) -> list[bytes]:
        return sorted(image.numpy().tobytes() for image in torch.cat([data[0], data[2]]))

    assert everything(first) == everything(second)


def test_seed_decides_the_split() -> None:
    first, same, other = digits(50, seed=1), digits(50, seed=1), digits(50, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, same))
    assert not torch.equal(first.train_images, other.train_images)


@pytest.mark.parametrize("train", [0, 1797, -3])
def test_impossible_split_is_refused(train: int) -> None:
    with pytest.raises(ValueError, match=f"train: needed 1 to 1796 images, found {train}"):
        digits(train)


def test_missing_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'symgeo\[demo\]'"):
        digits()


def test_batches_cover_everything_in_order() -> None:
    x, y = torch.arange(14.0).reshape(7, 2), torch.arange(7)
    cut = batches(x, y, size=3)
    assert [len(b[1]) for b in cut] == [3, 3, 1]
    assert torch.equal(torch.cat([b[0] for b in cut]), x)
    assert torch.equal(torch.cat([b[1] for b in cut]), y)
    assert [len(b[1]) for b in batches(x, y, size=3, count=2)] == [3, 3]


@pytest.mark.parametrize(
    ("length", "size", "count", "message"),
    [
        (6, 3, None, "y: needed one entry for each of the 7 rows of x, found 6"),
        (7, 0, None, "size: needed at least 1, found 0"),
        (7, 3, 0, "count: needed at least 1 or None, found 0"),
    ],
)
def test_bad_batches_are_named(length: int, size: int, count: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(torch.zeros(7, 2), torch.zeros(length), size, count)


def test_digit_batches_are_data_of_the_command_line() -> None:
    """What studies read, and, of the training side, all other commands."""
    split, data = load_splits("symgeo.data:digit_batches"), digits()
    assert [len(y) for _, y in split["train"]] == [128, 128, 128, 16]
    for side, images, labels in (("train", data[0], data[1]), ("test", data[2], data[3])):
        x, y = (torch.cat(columns) for columns in zip(*split[side]))
        assert torch.equal(x, images) and torch.equal(y, labels)
    (first,) = load_batches("symgeo.data:digit_batches", count=1)
    assert torch.equal(first[0], split["train"][0][0])
    with pytest.raises(ValueError, match="size: needed at least 1, found 0"):
        digit_batches(0)
