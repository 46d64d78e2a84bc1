"""A safetensors file written tensor by tensor, so that the whole of it is never in memory.

The format is a header, eight bytes of its length and then JSON with the place of every tensor, followed by the bytes
of the tensors without gaps.  Shapes and dtypes are known from the plan, so the header comes first and every tensor
is written to its place when it is ready.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

Spec = tuple[torch.dtype, tuple[int, ...]]
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn:
    "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class TensorFile:
    """A new safetensors file with the given tensors: ``write`` each of them once, in any order.

    Wider dtypes come first, then names in order, as safetensors itself lays them out, so that all are aligned.
    Given the ``part`` of the names that are written here, it opens a file that another :class:`TensorFile` of the
    same ``specs`` has made: processes fill one file together, every tensor has its own bytes.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], part: Iterable[str] | None = None) -> None:
        self.path, self._specs = path, dict(specs)
        header, self._places, size = _layout(specs)
        self._missing = set(specs if part is None else part)
        self._stream: BinaryIO = path.open("xb" if part is None else "r+b")
        if part is None:
            self._stream.write(header)
            self._stream.truncate(size)
            self._stream.flush()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place; ``ValueError`` if it is not the one that was announced."""
        dtype, shape = self._specs[name]
        if name not in self._missing or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name}: announced {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        self._missing.remove(name)
        self._stream.seek(self._places[name])
        self._stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._stream.flush()  # so that it is in the file once this returns, or the error of the disk is raised here

    def written(self, names: Iterable[str]) -> None:
        """Take note of tensors that another process has written."""
        self._missing.difference_update(names)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if kind is None and self._missing:
            raise ValueError(f"{len(self._missing)} announced tensors were never written: {sorted(self._missing)[:3]}")


def _layout(specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int], int]:
    """The header with its length before it, where every tensor begins, and where the file ends."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: (-specs[name][0].itemsize, name)):
        dtype, shape = specs[name]
        starts[name], end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data + start for name, start in starts.items()}, data + end
