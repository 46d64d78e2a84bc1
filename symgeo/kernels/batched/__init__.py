"""The kernels in plain torch, batched."""

from symgeo.kernels.batched.matrices import (
    NEWTON_POWERS,
    affine,
    gram,
    largest_eigenvalue,
    largest_singular_bound,
    newton_serves,
    pair_sums,
    polar,
    power,
)
from symgeo.kernels.batched.updates import apply_update, ema_gram
from symgeo.kernels.batched.vectors import combination, exponential_map, inner_products

__all__ = [
    "NEWTON_POWERS",
    "affine",
    "apply_update",
    "combination",
    "ema_gram",
    "exponential_map",
    "gram",
    "inner_products",
    "largest_eigenvalue",
    "largest_singular_bound",
    "newton_serves",
    "pair_sums",
    "polar",
    "power",
]
