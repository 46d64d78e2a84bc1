"""Batched small-matrix algebra: the one place for balancing, polar factors, guarded eigh and exponentials.

Everything takes leading batch dimensions, real or complex entries, and keeps dtype and device.  ``x.mH`` is
the conjugate transpose, so for complex pairs "Gram" means the Hermitian Gram matrix.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """``x`` in float64 or complex128: small algebra is always done in double precision."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def gram(x: Tensor) -> Tensor:
    """The Gram matrix ``x^H x`` of the columns, ``(..., n, h) -> (..., h, h)``."""
    return x.mH @ x


def split(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The two factors of a stacked pair ``[G; H]``."""
    return x[..., :rows, :], x[..., rows:, :]


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the Hermitian part of ``a`` ``(..., h, h)``.

    Raises ``ValueError`` when ``a`` has entries that are not finite (LAPACK would fail without saying why).
    """
    if not bool(torch.isfinite(a.abs()).all()):
        raise ValueError(f"eigh needs finite entries; {int((~torch.isfinite(a.abs())).sum())} entries are not finite")
    values, vectors = torch.linalg.eigh(0.5 * (a + a.mH))
    return values, vectors


def sylvester(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Solves ``A X + X B = C`` for Hermitian positive semidefinite ``A (p, p)``, ``B (q, q)`` by two ``eigh``.

    The minimum-norm solution where ``A`` and ``B`` share a null direction.

    >>> a = torch.eye(2); round(float(sylvester(a, a, 4 * a)[0, 0]), 6)
    2.0
    """
    values_a, vectors_a = eigh(a)
    values_b, vectors_b = eigh(b)
    total = values_a.unsqueeze(-1) + values_b.unsqueeze(-2)
    return vectors_a @ divide(vectors_a.mH @ c @ vectors_b, total) @ vectors_b.mH


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, and 0 where the denominator vanishes to rounding (a pseudo-inverse)."""
    tiny = torch.finfo(denominator.dtype).eps * denominator.abs().amax((-2, -1), keepdim=True)
    small = denominator.abs() <= tiny
    return torch.where(small, 0.0, numerator / torch.where(small, 1.0, denominator))


def polar(x: Tensor) -> Tensor:
    """The polar factor ``U V^H`` of ``x = U S V^H``: the closest matrix with orthonormal columns (or rows)."""
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def square_root(a: Tensor, iterations: int = 24) -> Tensor:
    """The principal square root of ``a`` (no eigenvalue on the negative real axis), by Denman-Beavers.

    A smooth function of ``a``, also at repeated eigenvalues, where differentiating ``eigh`` fails.

    >>> round(float(square_root(4 * torch.eye(1, dtype=torch.float64))), 12)
    2.0
    """
    norm = torch.linalg.matrix_norm(a, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    y, z = a / norm, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    for _ in range(iterations):
        y, z = 0.5 * (y + torch.linalg.inv(z)), 0.5 * (z + torch.linalg.inv(y))
    return y * norm.sqrt()


class Balance(NamedTuple):
    """Result of :func:`balance`.

    gauge : ``A (..., h, h)``;  inverse : ``A^-1``;  spectrum : ``(..., h)``, the singular values of ``G H^H``,
    which are the diagonal of both balanced Gram matrices;  deficient : ``(...)`` bool, pairs without full rank.
    """

    gauge: Tensor
    inverse: Tensor
    spectrum: Tensor
    deficient: Tensor


def balance(g: Tensor, h: Tensor, threshold: float = 1e-10) -> Balance:
    """The gauge ``A`` in which ``G A^-1`` and ``H A^H`` have one and the same, diagonal, Gram matrix.

    With thin factors ``G = Q_G R_G``, ``H = Q_H R_H`` and ``R_G R_H^H = U S V^H`` it is
    ``A = S^(-1/2) U^H R_G``, ``A^-1 = R_H^H V S^(-1/2)``: no Gram matrix is inverted and none is squared.
    The gauge is unique up to the phases of equal singular values (derived here).

    A pair whose product has a singular value below ``threshold`` times its largest has no such gauge; it is
    reported as deficient and balanced after the rows ``sqrt(threshold) |G| I`` and ``sqrt(threshold) |H| I``
    have been appended to the factors, which keeps the gauge finite and invertible.

    >>> g = torch.tensor([[4.0]], dtype=torch.float64); h = torch.tensor([[1.0]], dtype=torch.float64)
    >>> balance(g, h).spectrum.item()
    4.0
    """
    size = g.shape[-1]
    r_g, r_h = _triangle(g, None), _triangle(h, None)
    deficient = _deficient(r_g, r_h, threshold)
    if deficient.device.type != "cpu" or bool(deficient.any()):  # elsewhere asking would wait for the device
        floor = math.sqrt(threshold)
        mask = deficient[..., None, None]
        r_g = torch.where(mask, _triangle(g, floor), r_g)
        r_h = torch.where(mask, _triangle(h, floor), r_h)
    u, s, vh = torch.linalg.svd(r_g @ r_h.mH)
    root = s.clamp_min(torch.finfo(s.dtype).tiny).rsqrt()
    gauge = root.unsqueeze(-1) * (u.mH @ r_g)
    inverse = (r_h.mH @ vh.mH) * root.unsqueeze(-2)
    assert gauge.shape[-2:] == (size, size)
    return Balance(gauge, inverse, s, deficient)


def _triangle(x: Tensor, floor: float | None) -> Tensor:
    """The ``(h, h)`` triangular factor of ``x (..., n, h)``, with ``floor |x| I`` (or zeros) appended below."""
    size = x.shape[-1]
    eye = torch.eye(size, dtype=x.dtype, device=x.device)
    if floor is None:
        scale = torch.zeros((), dtype=x.real.dtype, device=x.device).expand(x.shape[:-2])
        if x.shape[-2] >= size:
            return torch.linalg.qr(x).R  # mode="r" would save nothing here and has no derivative
    else:
        norm = torch.linalg.matrix_norm(x)
        scale = floor * torch.where(norm > 0, norm, torch.ones_like(norm))
    padded = torch.cat([x, scale[..., None, None] * eye.expand(*x.shape[:-2], size, size)], dim=-2)
    return torch.linalg.qr(padded).R


def _deficient(r_g: Tensor, r_h: Tensor, threshold: float) -> Tensor:
    """Which pairs lack full column rank in either factor, relative to its largest singular value."""

    def lacking(r: Tensor) -> Tensor:
        s = torch.linalg.svdvals(r)
        return s[..., -1] <= threshold * s[..., 0]

    return lacking(r_g) | lacking(r_h)


# (degree, products) of the Paterson-Stockmeyer evaluation of a Taylor polynomial
_TAYLOR = ((2, 1), (4, 2), (6, 3), (9, 4), (12, 5), (16, 6))


def expm(a: Tensor, bound: float | None = None) -> Tensor:
    """The matrix exponential by a scaled Taylor polynomial, differentiable by plain autograd.

    ``bound`` is an upper bound for the spectral norm of every matrix of the batch; with it nothing is read
    back from the device.  (``torch.matrix_exp`` is as accurate, but its backward exponentiates a matrix of
    twice the size; this one's backward costs twice its forward.)

    >>> float(expm(torch.zeros(1, 1, dtype=torch.float64), bound=1.0))
    1.0
    """
    if bound is None:
        bound = float(torch.linalg.matrix_norm(a.detach()).max()) if a.numel() else 0.0
    degree, squarings = _plan(bound, torch.finfo(a.dtype).eps)
    result = _taylor(a * 0.5**squarings, degree)
    for _ in range(squarings):
        result = result @ result
    return result


def _plan(bound: float, precision: float) -> tuple[int, int]:
    """Degree and number of squarings with the fewest products whose truncation error is below rounding."""
    if not math.isfinite(bound):
        return 16, 0

    def cost(entry: tuple[int, int]) -> tuple[int, int, int]:
        degree, products = entry
        reach = (0.25 * precision * math.factorial(degree + 1)) ** (1.0 / (degree + 1))
        squarings = max(0, math.ceil(math.log2(bound / reach))) if bound > 0 else 0
        return products + squarings, degree, squarings

    _, degree, squarings = min(cost(entry) for entry in _TAYLOR)
    return degree, squarings


def _taylor(a: Tensor, degree: int) -> Tensor:
    """``sum_k a^k / k!`` up to ``degree``, in blocks of ``ceil(sqrt(degree))`` powers."""
    width = math.isqrt(degree - 1) + 1
    powers = [torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a), a]
    while len(powers) <= width:
        powers.append(powers[-1] @ a)
    result: Tensor | None = None
    for start in range(width * ((degree - 1) // width), -1, -width):
        stop = min(start + width - 1, degree)
        top = degree if result is None else stop  # the highest block also takes the power `width`
        block = powers[0] * (1.0 / math.factorial(start))
        for k in range(start + 1, top + 1):
            block = block + powers[k - start] * (1.0 / math.factorial(k))
        result = block if result is None else block + result @ powers[width]
    assert result is not None
    return result
