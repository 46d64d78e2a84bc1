"""Checkpoints of the demo's models: safetensors files that say how they were trained and how well they do."""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from symgeo.demo.training import Metrics, Params, Recipe, Setting
from symgeo.models.tiny_vit import TinyViT

RECIPE_VERSION = 1  # raise it when training changes in a way that the settings do not show


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of the demo; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model on disk: its place, its setting, its metrics, and the fingerprint of its training."""

    path: Path
    setting: Setting
    metrics: Metrics
    fingerprint: str

    def params(self) -> Params:
        """Read the parameters."""
        return _read(self.path)[0]

    def model(self) -> TinyViT:
        """A ``TinyViT`` with the parameters of the file."""
        model = TinyViT()
        model.load_state_dict(self.params())
        return model


def fingerprint(recipe: Recipe, settings: tuple[Setting, ...] | None = None) -> str:
    """Hash of what decides the trained models: settings, steps, split, and the versions in use."""
    described = asdict(recipe) | {"settings": [asdict(s) for s in settings or recipe.settings]}
    text = json.dumps([RECIPE_VERSION, torch.__version__, described], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def cache_folder(recipe: Recipe) -> Path:
    """``symgeo/demo-<fingerprint>`` in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the specification of XDG_CACHE_HOME says to ignore a relative path
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "symgeo" / f"demo-{fingerprint(recipe)}"


def save(path: Path, params: Params, setting: Setting, metrics: Metrics, training: str) -> Checkpoint:
    """Write a checkpoint whole or not at all: to a temporary name in the same folder, then renamed.

    ``training`` is the fingerprint by which ``train_all`` recognises a model that it need not train again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = {name: repr(value) for name, value in (asdict(setting) | asdict(metrics)).items()}
    metadata = {"format": "pt", "fingerprint": training} | numbers
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as temporary:
        written = Path(temporary) / path.name
        save_file({name: value.contiguous() for name, value in params.items()}, written, metadata=metadata)
        os.replace(written, path)
    return Checkpoint(path, setting, metrics, training)


def load(path: str | Path) -> tuple[TinyViT, Checkpoint]:
    """Read a checkpoint: the model, and its setting and metrics.

    Raises:
        CheckpointError: the file is not readable, is cut off, or holds something other than a ``TinyViT``.
    """
    checkpoint = inspect(path)
    return checkpoint.model(), checkpoint


def inspect(path: str | Path) -> Checkpoint:
    """Check a file as ``load`` does, and return what it says."""
    path = Path(path)
    params, metadata = _read(path)
    expected = {name: value.shape for name, value in TinyViT().named_parameters()}
    found = {name: value.shape for name, value in params.items()}
    if found != expected:
        wrong = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
        raise CheckpointError(f"{path}: needed the parameters of a TinyViT; wrong: {', '.join(wrong)}")
    if not all(value.isfinite().all() for value in params.values()):
        raise CheckpointError(f"{path}: needed finite parameters")
    setting, metrics = _parse(path, metadata)
    return Checkpoint(path, setting, metrics, metadata.get("fingerprint", ""))


def _read(path: Path) -> tuple[Params, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            # copies, since the tensors of an open file are windows on it, and the file may change
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def _parse(path: Path, metadata: dict[str, str]) -> tuple[Setting, Metrics]:
    names = [*Setting.__dataclass_fields__, *Metrics.__dataclass_fields__]
    try:
        number = {name: float(metadata[name]) for name in names}
        batch_size, seed = int(metadata["batch_size"]), int(metadata["seed"])
    except (KeyError, ValueError) as error:
        needed = ", ".join(names)
        raise CheckpointError(f"{path}: needed the numbers {needed} in its metadata: {error}") from error
    setting = Setting(number["lr"], number["weight_decay"], number["init_scale"], batch_size, seed)
    return setting, Metrics(*(number[name] for name in Metrics.__dataclass_fields__))
