"""The methods by name.  With weights ``w_i``:

============== ================================================================================ ==============
method         merged ``Delta``                                                                 rank
============== ================================================================================ ==============
tsvd           truncated SVD of ``sum_i w_i Delta_i``: the mean of the chordal distance         R
bures          ``B A`` of the mean of the balanced ``[B_i; A_i^T]`` modulo rotations            R
geodesic-mix   Fréchet mean for ``|xi_B A|^2 + |B xi_A|^2`` on ``(B, A)`` modulo ``GL(r)``      r (all r_i)
geodesic-inv   Fréchet mean for ``Tr (B^T B)^-1 xi_B^T xi_B + Tr (A A^T)^-1 xi_A xi_A^T``       r (all r_i)
cat            ``sum_i w_i Delta_i``, exactly                                                   ``sum r_i``
linear         ``(sum_i |w_i|^(1/2) B_i) (sum_i sign(w_i) |w_i|^(1/2) A_i)``: not invariant     r (all r_i)
ties           entries trimmed, a sign elected, agreeing ones averaged, in core coordinates     R
dare           entries dropped at random and rescaled, then summed, in core coordinates         R
knots          TIES on the right singular factors of ``[Delta_1 .. Delta_N]``                   R
tsv            singular vectors of all updates made orthogonal, singular values kept            R
iso            ``sum_i w_i Delta_i`` with all its singular values replaced by their mean        R
core           TIES in the core space of the stacked balanced factors                           R
============== ================================================================================ ==============

For updates with common singular vectors tsvd and geodesic-mix average the singular values arithmetically, bures as
``(sum_i w_i s_i^(1/2))^2``, geodesic-inv geometrically.

Those of :data:`METHODS` take a :class:`Problem` in core coordinates and return a :class:`Solution`; those of
:data:`FACTORWISE` act on the factors themselves, ``(factors, weights) -> (B, A)``, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from symgeo.merge.bures import bures
from symgeo.merge.elementwise import core, dare, knots, ties
from symgeo.merge.factorwise import cat, linear
from symgeo.merge.geodesic import geodesic_inv, geodesic_mix
from symgeo.merge.problem import Factors, Problem, Solution
from symgeo.merge.spectral import iso, tsv
from symgeo.merge.sums import tsvd

Method = Callable[[Problem], Solution]
Factorwise = Callable[[Sequence[Factors], Sequence[float]], Factors]

METHODS: dict[str, Method] = {
    "tsvd": tsvd,
    "bures": bures,
    "geodesic-mix": geodesic_mix,
    "geodesic-inv": geodesic_inv,
    "ties": ties,
    "dare": dare,
    "core": core,
    "knots": knots,
    "tsv": tsv,
    "iso": iso,
}
FACTORWISE: dict[str, Factorwise] = {"cat": cat, "linear": linear}
MEANS = ("bures", "geodesic-mix", "geodesic-inv")  # weights are normalised; all others are weighted sums
NAMES = (*METHODS, *FACTORWISE)
