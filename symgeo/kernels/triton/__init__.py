"""The kernels as Triton programs (:mod:`symgeo.kernels.programs`): shapes, strides, tables and launches.

They run on a GPU, or on CPU tensors in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is imported).
Batch dimensions and strides are arbitrary; a batch that is no view of equally spaced matrices is copied once.
They have no derivative.
"""

from symgeo.kernels.triton.matrices import affine, pair_sums, polar, power
from symgeo.kernels.triton.products import apply_update, ema_gram, gram
from symgeo.kernels.triton.vectors import combination, exponential_map, inner_products

__all__ = [
    "affine",
    "apply_update",
    "combination",
    "ema_gram",
    "exponential_map",
    "gram",
    "inner_products",
    "pair_sums",
    "polar",
    "power",
]
