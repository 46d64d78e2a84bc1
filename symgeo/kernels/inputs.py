"""What every backend asks of its input, and the two numbers they share: the accumulation type and the rank cutoff."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

# the largest matrix that one Triton program keeps to itself
LARGEST_PROGRAM = 64
# the most vectors that one pass over them takes
MOST_VECTORS = 4


def check_matrices(name: str, x: Tensor, square: bool = False) -> None:
    """Raises ``ValueError`` unless ``x`` is a real floating tensor ``(..., m, n)``, with ``m = n`` if ``square``."""
    shape = tuple(x.shape)
    wanted = "square matrices (..., n, n)" if square else "matrices (..., m, n)"
    if x.dim() < 2 or (square and shape[-1] != shape[-2]):
        raise ValueError(f"{name}: needed {wanted}, found shape {shape}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: needed a real floating tensor, found {x.dtype}")


def check_average(t: Tensor, x: Tensor) -> None:
    """Raises ``ValueError`` unless ``t`` can average Gram matrices of ``x``."""
    check_matrices("x", x)
    check_matrices("t", t, square=True)
    if t.dtype != accumulation_type(t.dtype):
        raise ValueError(f"t: an average of Gram matrices needs float32 or float64, found {t.dtype}")
    wanted = (*x.shape[:-1], x.shape[-2])
    if tuple(t.shape) != wanted:
        raise ValueError(f"t: x of shape {tuple(x.shape)} needs t of shape {wanted}, found {tuple(t.shape)}")
    check_written("t", t)


def check_update(w: Tensor, p: Tensor, x: Tensor) -> None:
    """Raises ``ValueError`` unless ``p x`` can be added to ``w``."""
    check_matrices("w", w)
    wanted = (*w.shape[:-1], w.shape[-2])
    if tuple(x.shape) != tuple(w.shape) or tuple(p.shape) != wanted:
        raise ValueError(
            f"p, x: w of shape {tuple(w.shape)} needs p of shape {wanted} and x like w, "
            f"found {tuple(p.shape)} and {tuple(x.shape)}"
        )
    check_matrices("p", p)
    check_matrices("x", x)
    check_written("w", w)


def check_written(name: str, x: Tensor) -> None:
    """Raises ``ValueError`` where several entries of ``x`` share one place in memory, as those of ``expand`` do."""
    if any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape)):
        raise ValueError(f"{name}: needed one place in memory for each entry, found strides {x.stride()}; clone it")


def same_memory(written: Tensor, *others: Tensor) -> bool:
    """Whether one of the others may lie where ``written`` does."""
    place = written.untyped_storage().data_ptr()
    return any(x.untyped_storage().data_ptr() == place for x in others)


def check_power(p: float, damping: float) -> None:
    """Raises ``ValueError`` unless ``p`` is finite and ``damping`` is finite and not negative."""
    if not math.isfinite(p):
        raise ValueError(f"p: needed a finite exponent, found {p}")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping: needed a finite number >= 0, found {damping}")


def check_finite(name: str, x: Tensor) -> None:
    """Raises ``ValueError`` if ``x`` has entries that are not finite (LAPACK would fail without saying why)."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{name}: needed finite entries, found {bad} that are not")


def check_vectors(vectors: Sequence[Tensor]) -> None:
    """Raises ``ValueError`` unless there are one to four real floating vectors of one length on one device."""
    if not 1 <= len(vectors) <= MOST_VECTORS:
        raise ValueError(f"vectors: needed 1 to {MOST_VECTORS} vectors, found {len(vectors)}")
    for x in vectors:
        if x.dim() != 1 or not x.is_floating_point():
            raise ValueError(f"vectors: needed real floating tensors (n,), found {x.dtype} of shape {tuple(x.shape)}")
    if len({(len(x), x.device) for x in vectors}) > 1:
        found = ", ".join(f"{len(x)} on {x.device}" for x in vectors)
        raise ValueError(f"vectors: needed one length and one device, found {found}")


def check_coefficients(vectors: Sequence[Tensor], coefficients: Tensor) -> None:
    """Raises ``ValueError`` unless there is one floating number for each vector, on their device."""
    if tuple(coefficients.shape) != (len(vectors),) or not coefficients.is_floating_point():
        raise ValueError(
            f"coefficients: needed a floating tensor ({len(vectors)},), one for each vector, "
            f"found {coefficients.dtype} of shape {tuple(coefficients.shape)}"
        )
    if coefficients.device != vectors[0].device:
        raise ValueError(f"coefficients: needed on {vectors[0].device} as the vectors, found {coefficients.device}")


def check_map(w: Tensor, z: Tensor, out: Tensor | None) -> None:
    """Raises ``ValueError`` unless ``w``, ``z`` and ``out`` are floating tensors of one shape on one device."""
    for name, x in (("z", z), ("out", w if out is None else out)):
        if x.shape != w.shape or x.device != w.device:
            raise ValueError(
                f"{name}: needed shape {tuple(w.shape)} on {w.device}, as w has, found {tuple(x.shape)} on {x.device}"
            )
    for name, x in (("w", w), ("z", z), ("out", w if out is None else out)):
        if not x.is_floating_point():
            raise ValueError(f"{name}: needed a real floating tensor, found {x.dtype}")


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The least type that holds the entries of all tensors."""
    return reduce(torch.promote_types, (x.dtype for x in tensors))


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything below: half precision is never summed in itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cutoff(dtype: torch.dtype, size: int) -> float:
    """The fraction of the largest eigenvalue (or singular value) at and below which one counts as zero.

    ``max(size * eps(accumulation type), eps(dtype))``: sums of ``size`` terms in the accumulation type, then
    rounded to ``dtype``.

    >>> cutoff(torch.float64, 1) == 2.0**-52, cutoff(torch.bfloat16, 5) == 2.0**-7
    (True, True)
    """
    return max(size * torch.finfo(accumulation_type(dtype)).eps, torch.finfo(dtype).eps)


def interpreting() -> bool:
    """Whether Triton was told to run its programs on the CPU, one after the other."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
