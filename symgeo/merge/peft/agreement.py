"""What adapters must agree on before they can be merged, and what their merge inherits from them."""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from symgeo.merge.peft.config import CONFIG
from symgeo.merge.peft.plan import BaseTensor
from symgeo.merge.peft.reader import Adapter, opened


@dataclass(frozen=True)
class Shared:
    """What the merge inherits: the base model, fields of the configuration, and what there is to say about them."""

    base_model: str | None
    fields: dict[str, Any]
    notes: tuple[str, ...]


def agree(adapters: Sequence[Adapter]) -> Shared:
    """The fields that the adapters share.

    Raises ``ValueError`` where two belong to different base models or revisions, or give one module different
    shapes.  A base model that is not named counts as the same.
    """
    base = _common_name(adapters, "base_model_name_or_path")
    revision = _common_name(adapters, "revision")
    _check_forms(adapters)
    notes = [f"{a.given}: taking the adapter in its subfolder {a.folder.name}" for a in adapters if a.inner]
    task = _if_unanimous(adapters, "task_type", notes)
    mapping = _if_unanimous(adapters, "auto_mapping", [])
    transposed = {bool(a.config.raw.get("fan_in_fan_out")) for a in adapters}
    fields = {
        "auto_mapping": mapping,
        "base_model_name_or_path": base,
        "fan_in_fan_out": True in transposed,
        "revision": revision,
        "task_type": task,
    }
    return Shared(base, fields, tuple(notes))


def common_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    """The dtype that all factors have; float32 for a mixture, or float64 where one has it."""
    found = {dtype for adapter in adapters for pair in adapter.pairs.values() for dtype in pair.dtypes}
    if len(found) == 1:
        return found.pop()
    return torch.float64 if torch.float64 in found else torch.float32


def shared_base_tensors(adapters: Sequence[Adapter], modules: Container[str]) -> dict[str, BaseTensor]:
    """Tensors of the base model that adapters carry along for the given modules.

    They are no part of the update and are never averaged.  Raises ``ValueError`` where two adapters carry different
    ones, because then they do not stand on the same base weights.
    """
    found: dict[str, BaseTensor] = {}
    for adapter in adapters:
        for key in (key for key, module in adapter.base.items() if module in modules):
            if key not in found:
                with opened(adapter.folder) as file:
                    tensor = file.get_tensor(key)
                    found[key] = BaseTensor(adapter, tensor.dtype, tuple(tensor.shape))
            elif not _same_bytes(adapter, found[key].source, key):
                raise ValueError(
                    f"{adapter.folder}: tensor {key} differs from that of {found[key].source.folder}: a weight of the "
                    "base model, which cannot be merged; take adapters of one base model"
                )
    return found


def _same_bytes(one: Adapter, other: Adapter, key: str) -> bool:
    with opened(one.folder) as file, opened(other.folder) as reference:
        x, y = file.get_tensor(key), reference.get_tensor(key)
        return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def _common_name(adapters: Sequence[Adapter], field: str) -> str | None:
    named = [(adapter, name) for adapter in adapters if (name := adapter.config.text(field)) is not None]
    if not named:
        return None
    first, wanted = named[0]
    for adapter, name in named[1:]:
        if not _same_model(name, wanted):
            raise ValueError(
                f"{adapter.folder}: {CONFIG}: {field} is {name!r}, but {wanted!r} in {first.folder}; take adapters of "
                f"one base model (if both name the same one, make {field} equal)"
            )
    return wanted


def _same_model(one: str, other: str) -> bool:
    if one.rstrip("/") == other.rstrip("/"):
        return True
    return os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other)


def _if_unanimous(adapters: Sequence[Adapter], field: str, notes: list[str]) -> Any:
    values = [value for adapter in adapters if (value := adapter.config.raw.get(field)) is not None]
    if all(value == values[0] for value in values):
        return values[0] if values else None
    notes.append(f"{field} differs between the adapters ({', '.join(map(str, values))}): left empty in the merged one")
    return None


def _check_forms(adapters: Sequence[Adapter]) -> None:
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        for module, pair in adapter.pairs.items():
            before = first.setdefault(module, adapter)
            known = before.pairs[module]
            if pair.form != known.form:
                raise ValueError(
                    f"{adapter.folder}: module {module}: lora_A {list(pair.a_shape)}, lora_B {list(pair.b_shape)} do "
                    f"not fit lora_A {list(known.a_shape)}, lora_B {list(known.b_shape)} of {before.folder}; "
                    "take adapters of one base model"
                )
