"""What every backend asks of its input, and the two numbers they share: the accumulation type and the rank cutoff."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.autograd import forward_ad

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


def check_average(t: Tensor, x: Tensor, beta: float) -> None:
    """Raises ``ValueError`` unless ``t``, whole or packed, can average Gram matrices of ``x`` by ``beta``."""
    check_matrices("x", x)
    if not t.is_floating_point() or t.dtype != accumulation_type(t.dtype):
        raise ValueError(f"t: an average of Gram matrices needs float32 or float64, found {t.dtype}")
    *batch, rows, _ = x.shape
    wanted = (*batch, rows * (rows + 1) // 2) if is_packed(t, x) else (*batch, rows, rows)
    if tuple(t.shape) != wanted:
        raise ValueError(
            f"t: x of shape {tuple(x.shape)} needs t of shape {(*batch, rows, rows)}, or upper triangles"
            f" {(*batch, rows * (rows + 1) // 2)}, found {tuple(t.shape)}"
        )
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: needed a number from 0 to 1, found {beta}")
    check_devices("t", t, x=x)
    check_written("t", t)


def is_packed(t: Tensor, x: Tensor) -> bool:
    """Whether ``t`` holds upper triangles of Gram matrices of ``x``: it has one axis less."""
    return t.dim() == x.dim() - 1


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
    check_devices("w", w, p=p, x=x)
    check_written("w", w)


def check_devices(name: str, first: Tensor, **others: Tensor) -> None:
    """Raises ``ValueError`` unless the others are where the first one is."""
    for other, x in others.items():
        if x.device != first.device:
            raise ValueError(f"{other}: needed on {first.device} as {name}, found on {x.device}")


def check_coefficients_fit(y: Tensor, **coefficients: float | Tensor) -> None:
    """Raises ``ValueError`` unless each is a number, or a tensor that broadcasts to the batch of ``y (..., m, n)``."""
    batch = y.shape[:-2]
    for name, value in coefficients.items():
        shape = value.shape if isinstance(value, Tensor) else ()
        places = batch[len(batch) - len(shape) :]
        if len(shape) > len(batch) or any(size not in (1, place) for size, place in zip(shape, places)):
            raise ValueError(
                f"{name}: needed a number, or a tensor with one for each matrix of y, of shape {tuple(batch)} or one"
                f" that broadcasts to it, found shape {tuple(shape)}"
            )


def check_written(name: str, x: Tensor) -> None:
    """Raises ``ValueError`` where several entries of ``x`` share one place in memory, as those of ``expand`` do."""
    if x.numel() and _overlaps(x):
        raise ValueError(f"{name}: needed one place in memory for each entry, found strides {x.stride()}; clone it")


def _overlaps(x: Tensor) -> bool:
    """Whether two entries share a place: never if each stride passes over all that the smaller ones reach."""
    reach, nested = 0, True
    axes = sorted((step, size) for step, size in zip(x.stride(), x.shape) if size > 1)
    for step, size in axes:
        nested = nested and step > reach
        reach += step * (size - 1)
    if nested:
        return False
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for step, size in axes:
        places = (places[:, None] + step * torch.arange(size, device="cpu")).flatten()
    return len(places.unique()) < len(places)


def tracked(*tensors: Tensor) -> bool:
    """Whether a derivative of either mode, or a transform of ``torch.func``, follows one of the tensors.

    Nothing may then be written in place or by a program.
    """
    enabled = torch.is_grad_enabled()
    return any(
        (x.requires_grad and enabled)
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or forward_ad.unpack_dual(x).tangent is not None
        for x in tensors
    )


def same_memory(written: Tensor, *others: Tensor) -> bool:
    """Whether one of the others may lie where ``written`` does."""
    place = written.untyped_storage().data_ptr()
    return any(x.untyped_storage().data_ptr() == place for x in others)


def check_power(p: float, damping: float, least: float = 0.0) -> None:
    """Raises ``ValueError`` unless ``p`` is finite, ``damping`` finite and not negative, and ``least`` a fraction."""
    if not math.isfinite(p):
        raise ValueError(f"p: needed a finite exponent, found {p}")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping: needed a finite number >= 0, found {damping}")
    if not 0.0 <= least <= 1.0:
        raise ValueError(f"least: needed a fraction from 0 to 1, found {least}")


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
