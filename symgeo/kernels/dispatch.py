"""Which kernels and backends there are, which of them can run here, and which to take."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from symgeo.kernels.inputs import interpreting, tracked

FAMILIES = {
    "matrices": ("gram", "power", "polar", "pair_sums", "affine"),
    "updates": ("ema_gram", "apply_update"),
    "vectors": ("inner_products", "combination", "exponential_map"),
}
BACKENDS = ("reference", "batched", "triton")


def names(family: str = "matrices") -> tuple[str, ...]:
    """The kernels of one family, every one in every backend.

    "matrices" maps a batch of matrices to a new tensor, "updates" work in place, "vectors" pass over long vectors.
    Raises ``ValueError`` for a family that does not exist.

    >>> names()
    ('gram', 'power', 'polar', 'pair_sums', 'affine')
    """
    if family not in FAMILIES:
        raise ValueError(f"family: needed one of {', '.join(FAMILIES)}, found {family!r}")
    return FAMILIES[family]


def available(backend: str) -> bool:
    """Whether a backend can run here.

    Triton can where it is installed and there is a GPU, or ``TRITON_INTERPRET=1`` is set.

    >>> available("reference"), available("batched"), available("abacus")
    (True, True, False)
    """
    return _obstacle(backend) is None


def get(name: str, backend: str | None = None) -> Callable[..., Tensor]:
    """One kernel of one backend, or with ``None`` the function of ``symgeo.kernels`` that chooses by itself.

    Raises ``ValueError`` for a name or backend that does not exist, and for a backend that cannot run here.

    >>> get("gram", "reference")(torch.tensor([[3.0, 4.0]]))
    tensor([[25.]])
    """
    known = [kernel for family in FAMILIES.values() for kernel in family]
    if name not in known:
        raise ValueError(f"name: needed one of {', '.join(known)}, found {name!r}")
    if backend is None:
        return _function("symgeo.kernels", name)
    obstacle = _obstacle(backend)
    if obstacle is not None:
        raise ValueError(f"backend: {obstacle}")
    return _function(f"symgeo.kernels.{backend}", name)


def choose(worthwhile: bool, *tensors: Tensor, double: bool = False) -> str:
    """Triton where it pays and can run, batched torch otherwise.

    It can for tensors on one GPU that no derivative and no transform of ``torch.func`` follows, and not for those in
    float64, unless it computes in ``double`` precision anyway.  Only types, devices and the caller's judgement of one
    matrix count, never how many there are, so that processes that share a batch choose alike.
    """
    if not worthwhile or len({x.device for x in tensors}) > 1:
        return "batched"
    eager = all(x.is_cuda and (double or x.dtype != torch.float64) for x in tensors) and not tracked(*tensors)
    return "triton" if eager and available("triton") else "batched"


def choose_method(name: str, backend: str, method: str | None, library: str) -> dict[str, str | None]:
    """What to hand on to a backend of a kernel that has two methods, "newton" and one of a library.

    Raises ``ValueError`` where the backend has only the other one.
    """
    own = {"reference": library, "triton": "newton"}.get(backend)
    if own is None:
        return {"method": method}
    if method not in (None, own):
        raise ValueError(f"method: {name} of backend {backend!r} is {own!r} only, found {method!r}")
    return {}


def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(module), name)


def _obstacle(backend: str) -> str | None:
    """Why a backend cannot run here, or None."""
    if backend not in BACKENDS:
        return f"needed one of {', '.join(BACKENDS)}, found {backend!r}"
    if backend != "triton":
        return None
    if not (torch.cuda.is_available() or interpreting()):
        return "'triton' needs a GPU, or TRITON_INTERPRET=1 set before it is imported, found neither; use 'batched'"
    try:
        import_module("triton")
    except ImportError as error:
        return f"'triton' cannot be imported ({error}); pip install triton, or use 'batched'"
    return None
