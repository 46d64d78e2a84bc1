"""A safetensors file written tensor by tensor, so that the whole of it is never in memory.

The format is a header, eight bytes of its length and then JSON with the place of every tensor, followed by the bytes
of the tensors without gaps.  Shapes and dtypes are known from the plan, so the header comes first and every tensor
is written to its place when it is ready.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

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
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        self._specs, self._offsets = dict(specs), {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(specs, key=lambda name: (-specs[name][0].itemsize, name)):
            dtype, shape = specs[name]
            start, end = end, end + dtype.itemsize * math.prod(shape)
            self._offsets[name] = start
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._missing = set(specs)
        self._stream = path.open("xb")
        self._stream.write(len(text).to_bytes(8, "little") + text)
        self._stream.truncate(self._data + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place; ``ValueError`` if it is not the one that was announced."""
        dtype, shape = self._specs[name]
        if name not in self._missing or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name}: announced {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        self._missing.remove(name)
        self._stream.seek(self._data + self._offsets[name])
        self._stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if kind is None and self._missing:
            raise ValueError(f"{len(self._missing)} announced tensors were never written: {sorted(self._missing)[:3]}")
