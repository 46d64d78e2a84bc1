"""Data by name, the loss that goes with it, and how well a model does on it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from symgeo.errors import is_out_of_memory
from symgeo.functional import Loss, Params, functional_loss
from symgeo.loading import FUNCTION, call

FORMATS = """SPEC is one of

- ``module:function``, a function that takes nothing and returns batches: an iterable of ``(x, y)`` or of
  dictionaries (keyword arguments of the model, with labels). For a study it returns
  ``{"train": batches, "test": batches}``.
- a ``.safetensors`` file with the tensors ``x`` and ``y`` (rows are examples), or with named columns such as
  ``input_ids``, ``attention_mask`` and ``labels``. For a study each name carries ``_train`` or ``_test``:
  ``x_train``, ``y_train``, ``x_test``, ``y_test``.
"""
Splits = dict[str, list[Any]]


def load_batches(spec: str, batch_size: int = 128, count: int | None = None) -> list[Any]:
    """The batches that ``spec`` names (see ``FORMATS``), at most ``count``; of two sides, the training side.

    Raises ``ValueError`` that names the spec, what was needed and what was found.
    """
    found = _read(spec, batch_size)
    if isinstance(found, Mapping):
        found = _side(spec, found, "train")
    return _listed(spec, found, count)


def load_splits(spec: str, batch_size: int = 128) -> Splits:
    """The training and the test batches that ``spec`` names (see ``FORMATS``).

    Raises ``ValueError`` as ``load_batches`` does, and where only one side is there.
    """
    found = _read(spec, batch_size)
    if not isinstance(found, Mapping):
        raise ValueError(
            f'--data {spec}: a study needs {{"train": batches, "test": batches}}, found one set of batches'
        )
    return {side: _listed(spec, _side(spec, found, side), None) for side in ("train", "test")}


def place(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A batch on the device, its floating-point tensors in the dtype."""
    if isinstance(batch, Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else batch.dtype)
    if isinstance(batch, Mapping):
        return {name: place(value, device, dtype) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(place(value, device, dtype) for value in batch)
    return batch


def default_loss(model: nn.Module, batch: Any) -> Loss:
    """The loss for batches like this one: ``output.loss`` for dictionaries, else :func:`supervised`."""
    plain = functional_loss(model, None if isinstance(batch, Mapping) else supervised)

    def loss(params: Params, batch: Any) -> Tensor:
        with naming_the_data(model):
            return plain(params, batch)

    return loss


@contextmanager
def naming_the_data(model: nn.Module) -> Iterator[None]:
    """Whatever a model raises on batches that do not fit it, as one ValueError that says where to look."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"data: {type(model).__name__} cannot compute its loss on a batch ({reason}); "
            "check columns, shapes and labels"
        ) from error


def supervised(output: Any, target: Tensor) -> Tensor:
    """Cross-entropy of logits (a tensor, or ``output.logits``) for integer targets, squared error for real ones."""
    prediction = getattr(output, "logits", output)
    if not isinstance(prediction, Tensor):
        raise ValueError(
            f"the model must return a tensor or an object with .logits for (x, y) batches; got {type(output).__name__}"
        )
    if not target.is_floating_point():
        if target.shape == prediction.shape[:-1]:
            return cross_entropy(prediction.flatten(0, -2), target.flatten())
        return cross_entropy(prediction, target)
    if target.shape != prediction.shape:
        raise ValueError(f"data: y has shape {tuple(target.shape)}, the model's output {tuple(prediction.shape)}")
    return mse_loss(prediction, target)


def _read(spec: str, batch_size: int) -> Any:
    path = Path(spec)
    if path.suffix == ".safetensors":
        return _from_file(path, batch_size)
    if FUNCTION.fullmatch(spec) and not path.exists():
        return call(spec, "--data")
    if path.exists():
        raise ValueError(f"--data {spec}: not a format that is read here; give a .safetensors file or module:function")
    raise ValueError(f"--data {spec}: no such file; give a .safetensors file or module:function")


def _from_file(path: Path, batch_size: int) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"--data {path}: no such file")
    try:
        columns = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--data {path}: not a readable safetensors file ({error}); write it again") from error
    sides = {side: _without(columns, f"_{side}") for side in ("train", "test")}
    if any(sides.values()):
        return {side: _cut(path, named, batch_size) for side, named in sides.items() if named}
    return _cut(path, columns, batch_size)


def _without(columns: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {name.removesuffix(suffix): column for name, column in columns.items() if name.endswith(suffix)}


def _cut(path: Path, columns: Mapping[str, Tensor], size: int) -> list[Any]:
    """Batches of rows; tuples where the columns are x and y, else dictionaries."""
    lengths = {name: len(column) if column.ndim else 0 for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        found = ", ".join(f"{name}: {n}" for name, n in lengths.items()) or "no tensors"
        raise ValueError(f"--data {path}: every tensor needs the same number of rows, at least one; found {found}")
    if "x" in columns and set(columns) != {"x", "y"}:
        raise ValueError(f"--data {path}: x goes with y and nothing else; found {', '.join(columns)}")
    pieces = {name: column.split(size) for name, column in columns.items()}
    rows = [dict(zip(pieces, parts)) for parts in zip(*pieces.values())]
    return [(row["x"], row["y"]) for row in rows] if "x" in columns else rows


def _side(spec: str, found: Mapping[str, Any], side: str) -> Any:
    if side not in found:
        raise ValueError(
            f"--data {spec}: needed {side!r} batches, found only {', '.join(map(repr, found)) or 'nothing'}"
        )
    return found[side]


def _listed(spec: str, batches: Any, count: int | None) -> list[Any]:
    if isinstance(batches, (Tensor, str)) or not isinstance(batches, Iterable):
        raise ValueError(f"--data {spec}: needed an iterable of batches, found {type(batches).__name__}")
    listed = list(itertools.islice(batches, count))
    if not listed:
        raise ValueError(f"--data {spec}: found no batches; return at least one")
    for batch in listed:
        if not isinstance(batch, Mapping) and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError(f"--data {spec}: a batch is (x, y) or a dictionary, found {type(batch).__name__}")
    return listed
