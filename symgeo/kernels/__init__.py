"""Five kernels in three backends: the definition in float64, batched torch, and Triton where it can run.

=============  ==========================================================  ==================================
name           what                                                        shapes
=============  ==========================================================  ==================================
``gram``       ``x x^T``, of rows less their means if asked                ``(..., f, n) -> (..., f, f)``
``power``      ``(t + damping max(s))^p`` on the range                     ``(..., n, n) -> (..., n, n)``
``polar``      ``x (x^T x)^(-1/2)``                                        ``(..., m, n) -> (..., m, n)``
``pair_sums``  ten sums invariant under permutations                       ``(..., n, n) -> (..., 10)``
``affine``     ``a y + b rowmean + c colmean + d mean``                    ``(..., m, n) -> (..., m, n)``
=============  ==========================================================  ==================================

Any strides and leading batch dimensions, none and empty ones too; dtype and device are kept, inputs unchanged,
half precision is summed in float32.  The functions here choose a backend by device, size and dtype; ``backend=``
or :func:`get` choose it by name.  :func:`ema_gram` and :func:`apply_update` work in place.

Triton takes over on a GPU, for tensors without gradient that are not float64, where it saves memory traffic or
launches: always for ``pair_sums`` and ``affine``, up to 32 centred rows for ``gram``, up to 64 x 64 for ``polar``
and the powers -1, -1/2, -1/4, 1/4, 1/2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor

from symgeo.kernels import batched
from symgeo.kernels.batched import NEWTON_POWERS
from symgeo.kernels.inputs import LARGEST_PROGRAM, check_matrices, interpreting
from symgeo.kernels.update import apply_update, ema_gram

_NAMES = ("gram", "power", "polar", "pair_sums", "affine")
_BACKENDS = ("reference", "batched", "triton")


def names() -> tuple[str, ...]:
    """The kernels that every backend has.

    >>> names()
    ('gram', 'power', 'polar', 'pair_sums', 'affine')
    """
    return _NAMES


def available(backend: str) -> bool:
    """Whether a backend can run here.

    Triton can where it is installed and there is a GPU, or ``TRITON_INTERPRET=1`` is set.

    >>> available("reference"), available("batched"), available("abacus")
    (True, True, False)
    """
    return _obstacle(backend) is None


def get(name: str, backend: str | None = None) -> Callable[..., Tensor]:
    """One kernel of one backend, or with ``None`` the function of this module that chooses by itself.

    Raises ``ValueError`` for a name or backend that does not exist, and for a backend that cannot run here.

    >>> get("gram", "reference")(torch.tensor([[3.0, 4.0]]))
    tensor([[25.]])
    """
    if name not in _NAMES:
        raise ValueError(f"name: needed one of {', '.join(_NAMES)}, found {name!r}")
    if backend is None:
        return globals()[name]
    obstacle = _obstacle(backend)
    if obstacle is not None:
        raise ValueError(f"backend: {obstacle}")
    return getattr(import_module(f"symgeo.kernels.{backend}"), name)


def gram(x: Tensor, center: bool = False, *, backend: str | None = None) -> Tensor:
    """``x x^T`` of ``x (..., f, n)``, exactly symmetric; ``center`` subtracts each row's mean first, in two passes.

    >>> gram(torch.tensor([[1.0, 3.0], [0.0, 2.0]]), center=True)
    tensor([[2., 2.],
            [2., 2.]])
    """
    check_matrices("x", x)
    return get("gram", backend or _choose(x, center and x.shape[-2] <= 32))(x, center)


def power(t: Tensor, p: float, damping: float = 0.0, *, backend: str | None = None) -> Tensor:
    """``V (s + damping max(s))^p V^T`` for symmetric positive semidefinite ``t = V s V^T (..., n, n)``.

    Eigenvalues that are zero to rounding after damping give zero under every power (a pseudo-inverse).  Entries
    that are not finite raise ``ValueError`` on the CPU; a GPU is not waited for, and gives none that are.

    >>> power(torch.diag(torch.tensor([4.0, 0.0])), -0.5)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.0000]])
    """
    check_matrices("t", t, square=True)
    small = t.shape[-1] <= LARGEST_PROGRAM and p in NEWTON_POWERS
    return get("power", backend or _choose(t, small))(t, p, damping)


def polar(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The polar factor ``U V^T`` of ``x = U s V^T (..., m, n)``, over the singular values that are not zero.

    It does not depend on the scale of ``x``, and is 0 for ``x = 0``.  Entries that are not finite raise
    ``ValueError`` on the CPU; a GPU is not waited for, and gives none that are.

    >>> polar(torch.tensor([[3e-12], [4e-12]]))
    tensor([[0.6000],
            [0.8000]])
    """
    check_matrices("x", x)
    return get("polar", backend or _choose(x, max(x.shape[-2:]) <= LARGEST_PROGRAM))(x)


def pair_sums(y: Tensor, *, backend: str | None = None) -> Tensor:
    """Ten sums of ``y (..., n, n)`` that no permutation of its indices changes, ``(..., 10)``.

    With row sums ``r``, column sums ``c`` and diagonal ``d``:
    ``sum d, sum y, sum y_ij^2, sum y_ij y_ji, |d|^2, |r|^2, |c|^2, r.c, d.r, d.c``.

    >>> pair_sums(torch.eye(2)).tolist()
    [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """
    check_matrices("y", y, square=True)
    return get("pair_sums", backend or _choose(y, True))(y)


def affine(
    y: Tensor, a: float | Tensor, b: float | Tensor, c: float | Tensor, d: float | Tensor, *, backend: str | None = None
) -> Tensor:
    """``a y_ij + b mean_j(y_ij) + c mean_i(y_ij) + d mean(y)`` of ``y (..., m, n)``.

    A coefficient is a number, or a tensor ``(...)`` with one for each matrix.

    >>> affine(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), 1, -1, -1, 1)
    tensor([[0., 0.],
            [0., 0.]])
    """
    check_matrices("y", y)
    return get("affine", backend or _choose(y, True))(y, a, b, c, d)


def inner_products(vectors: Sequence[Tensor]) -> Tensor:
    """``G_ij = sum_k u_ik u_jk`` of one to four vectors ``(n,)``: a float64 tensor ``(k, k)`` on their device.

    One read; sums of blocks in the accumulation type are added in float64, in a fixed order.

    >>> inner_products([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]).tolist()
    [[5.0, 11.0], [11.0, 25.0]]
    """
    return batched.inner_products(vectors)


def combination(vectors: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """``sum_i c_i u_i`` of one to four vectors ``(n,)``, with coefficients ``(k,)`` on their device.

    >>> combination([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], torch.tensor([2.0, -1.0]))
    tensor([-1.,  0.])
    """
    return batched.combination(vectors, coefficients)


def exponential_map(w: Tensor, z: Tensor, out: Tensor | None = None) -> Tensor:
    """``w exp(z)`` of tensors of one shape, in the type of ``w``; into ``out``, which may be ``w`` or ``z``, if given.

    >>> exponential_map(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0]))
    tensor([ 1.0000, -5.4366])
    """
    return batched.exponential_map(w, z, out)


def _choose(x: Tensor, worthwhile: bool) -> str:
    """Triton where it pays and can run, batched torch otherwise."""
    eager = x.is_cuda and x.dtype != torch.float64 and not (x.requires_grad and torch.is_grad_enabled())
    return "triton" if worthwhile and eager and available("triton") else "batched"


def _obstacle(backend: str) -> str | None:
    """Why a backend cannot run here, or None."""
    if backend not in _BACKENDS:
        return f"needed one of {', '.join(_BACKENDS)}, found {backend!r}"
    if backend != "triton":
        return None
    if not (torch.cuda.is_available() or interpreting()):
        return "'triton' needs a GPU, or TRITON_INTERPRET=1 set before it is imported, found neither; use 'batched'"
    try:
        import_module("triton")
    except ImportError as error:
        return f"'triton' cannot be imported ({error}); pip install triton, or use 'batched'"
    return None


__all__ = [
    "affine",
    "apply_update",
    "available",
    "combination",
    "ema_gram",
    "exponential_map",
    "get",
    "gram",
    "inner_products",
    "names",
    "pair_sums",
    "polar",
    "power",
]
