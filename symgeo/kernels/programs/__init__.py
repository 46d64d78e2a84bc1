"""The Triton programs: what one program instance computes.  Tiles are masked, offsets are 64-bit, order is fixed.

Sums are formed in ``ACC``, float32 or float64, and results do not depend on which instance ran first.  Entries are
widened to ``ACC`` before any arithmetic, except where a tensor core takes the factors of a product in half precision.
"""

from symgeo.kernels.programs.matrices import (
    affine_program,
    line_sums_program,
    pair_sums_program,
    polar_program,
    power_program,
)
from symgeo.kernels.programs.products import apply_program, gram_program
from symgeo.kernels.programs.vectors import combination_program, exponential_program, inner_program

__all__ = [
    "affine_program",
    "apply_program",
    "combination_program",
    "exponential_program",
    "gram_program",
    "inner_program",
    "line_sums_program",
    "pair_sums_program",
    "polar_program",
    "power_program",
]
