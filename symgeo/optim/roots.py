"""Inverse powers of second moments: by eigenvalues, by matrix products only, and without any root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from manifolds.linalg import eigh, gram, widen
from symgeo.curvature import Bucket, DenseBlock
from symgeo.curvature.spectrum import Spectrum, damped_power, largest_of, threshold
from symgeo.curvature.structured import Block
from symgeo.kernels import largest_eigenvalue, polar, power
from symgeo.optim.packed import hermitian_product, unpack

#: up to this size eigenvalues are computed in double precision whatever that of the matrix
_SMALL = 64

#: eigenvalues of a matrix formed with rounding eps are zero below this times eps M times the largest
_SLACK = 4.0


def inverse_power(blocks: Sequence[Block], exponent: float, damping: float, eps: float) -> list[Block]:
    r"""``(T + damping s_max)^-exponent`` of all blocks by eigenvalues.

    In double precision but for single precision matrices of more than 64 rows, which carry rounding errors of the
    size of those of `eigh` already.  ``s_max`` is the largest eigenvalue of all blocks.  Without damping 0 has the
    power 0 (a pseudo-inverse), and eigenvalues of a matrix that was formed with rounding errors `eps` are zero below
    ``4 eps M`` times its largest.

    >>> [root] = inverse_power([DenseBlock(torch.tensor([[[[4.0, 0.0], [0.0, 0.0]]]]))], 0.5, 0.0, 1e-7)
    >>> root.matrix.diagonal(dim1=-2, dim2=-1).flatten()
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    spectra = [_cut(block, _spectrum(block), eps) for block in blocks]
    rule = damped_power(-exponent, damping, largest_of([widen(s.largest) for s in spectra], damping))
    return [_rebuilt(block, s, *s.map(rule)) for block, s in zip(blocks, spectra)]


def _spectrum(block: Block) -> Spectrum:
    if not isinstance(block, DenseBlock) or block.root is not None or block.copies <= _SMALL:
        return block.spectrum()
    values, vectors = eigh(block.matrix)
    limit = threshold(values.abs().amax(-1), block.copies)
    return Spectrum(values, vectors, 0, torch.zeros_like(limit), limit)


def _rebuilt(block: Block, spectrum: Spectrum, values: Tensor, rest: Tensor) -> Block:
    """``block.rebuilt`` from half of the product where all eigenvectors of a matrix are there."""
    vectors = spectrum.vectors
    if vectors is None or spectrum.count:
        return block.rebuilt(spectrum, values, rest)
    return DenseBlock(unpack(hermitian_product(vectors * values.unsqueeze(-2), vectors), block.copies))


def _cut(block: Block, spectrum: Spectrum, eps: float) -> Spectrum:
    """With the threshold of the precision in which the matrix was formed."""
    if not isinstance(block, DenseBlock) or block.root is not None:
        return spectrum
    limit = _SLACK * eps * block.copies * spectrum.values.abs().amax(-1)
    return replace(spectrum, threshold=torch.maximum(spectrum.threshold, limit))


def matmul_powers(blocks: Sequence[Block], exponent: float, damping: float) -> list[Block]:
    r"""The same by matrix products only, without waiting for the device: `symgeo.kernels` finds the roots.

    The largest eigenvalue is low by at most a few parts in 10^5; eigenvalues below 1e-8 of the largest one of their
    matrix count as 0 where the damping is smaller.  exponent: 1/4, 1/2 or 1.

    >>> [root] = matmul_powers([DenseBlock(torch.tensor([[[[4.0, 0.0], [0.0, 16.0]]]]))], 0.5, 0.0)
    >>> root.matrix.diagonal(dim1=-2, dim2=-1).flatten().round(decimals=6)
    tensor([0.5000, 0.2500], dtype=torch.float64)
    """
    largest = largest_of([_largest(block) for block in blocks], damping)
    shift = damping * largest
    result: list[Block] = []
    for block in blocks:
        if isinstance(block, DenseBlock):
            result.append(DenseBlock(_newton(widen(block.matrix), exponent, shift, damping / (1 + damping))))
        else:
            spectrum = block.spectrum()
            rule = damped_power(-exponent, damping, largest)
            result.append(block.rebuilt(spectrum, *spectrum.map(rule)))
    return result


def _largest(block: Block) -> Tensor:
    if isinstance(block, DenseBlock):
        t = _real(widen(block.matrix)).flatten(0, -3)
        scale = t.abs().amax().clamp_min(torch.finfo(t.dtype).tiny)
        return scale * largest_eigenvalue(t / scale).amax()
    return block.spectrum().largest


def _newton(t: Tensor, exponent: float, shift: Tensor, least: float) -> Tensor:
    """(t + shift)^-exponent, all of whose eigenvalues are at least the fraction `least` of its largest."""
    eye = torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)
    root = power(_real(t + shift * eye), -exponent, method="newton", least=least)
    if not t.is_complex():
        return root
    size = t.shape[-1]
    return torch.complex(root[..., :size, :size], root[..., size:, :size])


def _real(t: Tensor) -> Tensor:
    """A Hermitian matrix as the real symmetric one of twice the size."""
    if not t.is_complex():
        return t
    return torch.cat([torch.cat([t.real, -t.imag], dim=-1), torch.cat([t.imag, t.real], dim=-1)], dim=-2)


def matmul_polar(bucket: Bucket, x: Tensor) -> Tensor:
    """sqrt(d) times the polar factor of real coordinates, by matrix products only, at every scale of x."""
    return bucket.dimension**0.5 * polar(x, method="newton")


def group_update(k: Tensor, t: Tensor, rate: float | Tensor, damping: Tensor, diagonal: bool) -> Tensor:
    r"""One root-free, inverse-free step of K towards ``K K^H = (T + damping)^-1``.

    ``K <- K (I - rate m / max(1, |m|_F))``,  ``m = (K^H T K + damping K^H K - I) / 2``

    the first-order exponential of arXiv 2312.05705 for one factor, with the second moment T of one step in place of
    its gradients; a small rate averages over steps.  A block of zeros is new and starts at ``(tr T / M + damping)
    ^(-1/2) I``.  k, t: (K, B, M, M), or diagonals (K, B, M), whose entries are blocks of their own.

    >>> group_update(torch.tensor([[[0.5]]]), torch.tensor([[[4.0]]]), 0.1, torch.tensor(0.0), diagonal=True)
    tensor([[[0.5000]]])
    """
    if diagonal:
        k = torch.where(k == 0, _start(t + damping), k)
        m = 0.5 * (k.square() * (t + damping) - (k != 0).to(k.dtype))
        return k * (1 - rate * m / m.abs().clamp_min(1.0))
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    mean = t.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None]
    k = torch.where(k.abs().amax((-2, -1), keepdim=True) == 0, _start(mean + damping) * eye, k)
    m = 0.5 * (k.mH @ t @ k + damping * gram(k) - eye)
    size = torch.linalg.matrix_norm(m)[..., None, None].clamp_min(1.0)
    return k - rate * (k @ (m / size))


def _start(t: Tensor) -> Tensor:
    """t^(-1/2), 0 for 0."""
    return torch.where(t > 0, torch.where(t > 0, t, 1.0).rsqrt(), 0.0)
