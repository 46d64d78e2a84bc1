"""An adapter folder: found, its header checked, its factors read a few modules at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from symgeo.merge.peft.config import CONFIG, AdapterConfig, pattern_key, read_config
from symgeo.merge.peft.keys import PAIRS, PREFIX, owner, parse_key
from symgeo.merge.problem import Factors

WEIGHTS = "adapter_model.safetensors"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Pair:
    """The factors of one module as they lie on disk: ``A (r, ...)``, ``B (m, r, ...)``, flattened to matrices."""

    module: str
    kind: str  # "linear" or "embedding", as their keys are named; convolutions are linear with longer shapes
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    dtypes: frozenset[torch.dtype]

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.a_shape[0]

    @property
    def rows(self) -> int:
        """Number of rows ``m`` of the update ``B A``."""
        return self.b_shape[0]

    @property
    def columns(self) -> int:
        """Number of columns ``n`` of the update; all inner axes of a convolution's A count as one."""
        return math.prod(self.a_shape[1:])

    @property
    def keys(self) -> tuple[str, str]:
        """Names of A and B in the file."""
        a, b = (f"{PREFIX}{self.module}.{role}" for role in PAIRS[self.kind])
        return a, b

    @property
    def form(self) -> tuple[object, ...]:
        """What must agree between adapters of one module: everything but the rank."""
        return (self.kind, self.b_shape[0], *self.a_shape[1:])


@dataclass(frozen=True)
class Adapter:
    """A checked adapter.  ``base``: tensors of the base model that PEFT stored beside the factors -> their modules."""

    given: str
    folder: Path
    config: AdapterConfig
    pairs: dict[str, Pair]
    base: dict[str, str]

    @property
    def inner(self) -> bool:
        """Whether the adapter lies in a subfolder of the folder that was given."""
        return self.folder != Path(self.given)

    @property
    def file(self) -> Path:
        """The file of the tensors."""
        return self.folder / WEIGHTS

    def sha256(self) -> str:
        """Hash of the file of the tensors."""
        with self.file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def factors(self, modules: Sequence[str], device: torch.device) -> Factors:
        """Factors ``(modules, m, r)`` and ``(modules, r, n)`` with the product ``s B A``, of modules of equal shape.

        Both take ``sqrt(|s|)``, B with the sign: for all methods but "linear" any split is the same, and PEFT's
        "linear" splits like this.  Raises ``ValueError`` naming the tensor that has entries that are not finite.
        """
        first = self.pairs[modules[0]]
        a = torch.empty(len(modules), first.rank, first.columns, dtype=torch.float64, device=device)
        b = torch.empty(len(modules), first.rows, first.rank, dtype=torch.float64, device=device)
        with opened(self.folder) as file:  # closed after every batch: what was mapped into memory is given back
            for i, module in enumerate(modules):
                for key, x in zip(self.pairs[module].keys, (a[i], b[i])):
                    stored = file.get_tensor(key)
                    if not bool(torch.isfinite(stored).all()):
                        raise ValueError(
                            f"{self.folder}: tensor {key} has entries that are not finite; train the adapter again"
                        )
                    x.copy_(stored.reshape(x.shape))
                scale = self.config.scale_of(owner(module))
                a[i] *= math.sqrt(abs(scale))
                b[i] *= math.copysign(math.sqrt(abs(scale)), scale)
        return b, a


@contextmanager
def opened(folder: Path) -> Iterator[Any]:
    """The tensors of an adapter folder, mapped into memory."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{folder}: {WEIGHTS} is not a readable safetensors file ({error}); save it again") from error


def find_folder(given: str | Path) -> Path:
    """The folder that holds the adapter: the one given, or its only subfolder that does.

    PEFT saves an adapter that is not named "default" in a subfolder of its name.  Raises ``ValueError`` naming what
    is missing.
    """
    path = Path(given)
    if not path.is_dir():
        what = "a file, not a folder" if path.exists() else "no such folder"
        raise ValueError(f"{path}: {what}; give a folder with {CONFIG} and {WEIGHTS}")
    if not (path / CONFIG).is_file():
        inner = sorted(child for child in path.iterdir() if (child / CONFIG).is_file())
        if len(inner) == 1:
            path = inner[0]
        elif inner:
            names = ", ".join(child.name for child in inner[:5])
            raise ValueError(f"{path}: {CONFIG} is missing here, and several subfolders have one ({names}); name one")
        else:
            raise ValueError(f"{path}: {CONFIG} is missing; give a folder written by PeftModel.save_pretrained")
    if not (path / WEIGHTS).is_file():
        old = path / "adapter_model.bin"
        how = "; adapter_model.bin is a pickle and is not read: load it with PEFT and save it again (safetensors)"
        raise ValueError(f"{path}: {WEIGHTS} is missing{how if old.exists() else '; save the adapter again'}")
    return path


def read_adapter(given: str | Path) -> Adapter:
    """Find and check an adapter by its configuration and the header of its tensors; no tensor is read.

    Raises ``ValueError`` naming the folder, the field or tensor, what was found and what to do.
    """
    folder = find_folder(given)
    config = read_config(folder)
    found: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    with opened(folder) as file:
        for key in file.keys():
            header = file.get_slice(key)
            found[parse_key(folder, key)] = (tuple(header.get_shape()), header.get_dtype())
    modules = dict.fromkeys(module for module, role in sorted(found) if not role.startswith("base_layer"))
    if not modules:
        raise ValueError(f"{folder}: {WEIGHTS} holds no lora_A, lora_B; save the adapter again")
    pairs = {module: _pair(config, module, found) for module in modules}
    base = {f"{PREFIX}{module}.{role}": module for module, role in sorted(found) if role.startswith("base_layer")}
    for key, module in base.items():
        if module not in pairs:
            raise ValueError(f"{folder}: tensor {key} belongs to a module without factors; save the adapter again")
    return Adapter(str(given), folder, config, pairs, base)


def _pair(config: AdapterConfig, module: str, found: dict[tuple[str, str], tuple[tuple[int, ...], str]]) -> Pair:
    folder = config.folder
    present = [kind for kind, roles in PAIRS.items() if any((module, role) in found for role in roles)]
    if len(present) > 1:
        raise ValueError(f"{folder}: module {module} has factors of a layer and of an embedding; save it again")
    kind = present[0]
    missing = [role for role in PAIRS[kind] if (module, role) not in found]
    if missing:
        raise ValueError(f"{folder}: tensor {PREFIX}{module}.{missing[0]} is missing; save the adapter again")
    (a, a_type), (b, b_type) = (found[module, role] for role in PAIRS[kind])
    for dtype in (a_type, b_type):
        if dtype not in DTYPES:
            raise ValueError(f"{folder}: module {module} has factors of dtype {dtype}, needed {', '.join(DTYPES)}")
    _check_shapes(config, module, kind, a, b)
    return Pair(module, kind, a, b, frozenset((DTYPES[a_type], DTYPES[b_type])))


def _check_shapes(config: AdapterConfig, module: str, kind: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    shapes = f"{config.folder}: module {module}: lora_A has shape {list(a)}, lora_B {list(b)}"
    conv = len(a) > 2
    if len(a) < 2 or len(a) != len(b) or (conv and kind == "embedding") or math.prod(a) * math.prod(b) == 0:
        raise ValueError(f"{shapes}, needed (r, n) and (m, r), none of them empty; save the adapter again")
    if conv and b[1] < a[0] and a[0] % b[1] == 0:
        raise ValueError(
            f"{shapes}: a grouped convolution (groups = {a[0] // b[1]}), which cannot be merged; leave it out"
        )
    if b[1] != a[0] or any(size != 1 for size in b[2:]):
        raise ValueError(f"{shapes}: their ranks differ; save the adapter again")
    wanted = config.rank_of(owner(module))
    if a[0] != wanted:
        key = pattern_key(config.rank_pattern, owner(module))
        field = f"rank_pattern {key!r}" if key in config.rank_pattern else "r"
        raise ValueError(
            f"{shapes}, rank {a[0]}, but {CONFIG} says {field} = {wanted}; correct {CONFIG}, or save the adapter again"
        )
