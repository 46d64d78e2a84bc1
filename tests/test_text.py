"""The source of the standard library as symbols, its batches and its fixed examples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from symgeo.data import SYMBOLS, Text, python_source


def spell(numbers: torch.Tensor) -> str:
    return "".join(SYMBOLS[i] for i in numbers.tolist())


def folder(tmp_path: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_symbols_are_newline_and_printable_ascii() -> None:
    assert len(set(SYMBOLS)) == 96
    assert all(symbol == "\n" or (symbol.isprintable() and symbol.isascii()) for symbol in SYMBOLS)


def test_files_are_split_in_the_order_of_names(tmp_path: Path) -> None:
    files = {"c.py": "three\n", "a.py": "one\n", "d.py": "four\n", "b.py": "two\n", "e.py": "five", "f.txt": "none"}
    text = python_source(folder(tmp_path, files), every=2)
    assert spell(text.train) == "one\nthree\nfive"
    assert spell(text.validation) == "two\nfour\n"


def test_other_characters_are_mapped(tmp_path: Path) -> None:
    text = python_source(folder(tmp_path, {"a.py": "\tx = 'é∑'\x07\r\n~", "b.py": ""}), every=2)
    assert spell(text.train) == " x = '??'?\n~"
    assert text.train.dtype == torch.uint8 and len(text.validation) == 0


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"needed at least every = 11 files \*\.py in .*{tmp_path.name}, found 1"):
        python_source(folder(tmp_path, {"a.py": "x"}))
    with pytest.raises(ValueError, match="every: needed at least 2, found 1"):
        python_source(every=1)


def test_standard_library_is_large_enough() -> None:
    text = python_source()
    assert len(text.train) > 2_000_000 and len(text.validation) > 100_000
    assert "def " in spell(text.train[:20_000])
    assert text.digest() == python_source().digest()


def tiny() -> Text:
    return Text(torch.arange(37, dtype=torch.uint8), torch.arange(50, 81, dtype=torch.uint8))


def test_batches_are_windows_with_their_next_symbols() -> None:
    batches = list(tiny().batches(seed=0, steps=211, batch=3, context=5))
    assert len(batches) == 211
    for x, y in batches:
        assert x.shape == y.shape == (3, 5) and x.dtype == y.dtype == torch.int64
        assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(5))
    starts = {int(i) for x, _ in batches for i in x[:, 0]}
    assert starts == set(range(32))  # every window that has a next symbol


def test_seed_decides_the_batches() -> None:
    first, same, other = (list(tiny().batches(s, 7, 3, 5)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, same))
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(first, other))


def test_examples_are_fixed_and_spread() -> None:
    x, y = tiny().examples(count=3, context=4)
    assert x[:, 0].tolist() == [50, 59, 68] and torch.equal(y, x + 1)
    last, _ = tiny().examples(count=27, context=4)
    assert last[-1].tolist() == [76, 77, 78, 79]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 3, 5), "steps: needed at least 1, found 0"),
        ((2, 0, 5), "batch: needed at least 1, found 0"),
        ((2, 3, 0), "context: needed at least 1, found 0"),
        ((2, 3, 37), "train: needed more than context = 37 symbols, found 37"),
    ],
)
def test_bad_batches_are_named(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(tiny().batches(0, *sizes))


def test_too_many_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="count: needed 1 to 27 windows, found 28"):
        tiny().examples(28, 4)
