"""Riemannian geometry of quotient manifolds on torch tensors.

Importing the package makes geoopt's Riemannian SGD start its momentum at zero on these manifolds (see
:mod:`manifolds.momentum`); nothing else in the process is affected.
"""

from manifolds import momentum as _momentum
from manifolds.base import QuotientManifold
from manifolds.bures import BuresWasserstein
from manifolds.elementwise import Elementwise
from manifolds.factored import FactorPair
from manifolds.fixed_rank import FixedRank
from manifolds.frechet import FrechetMean, ProblemReport, frechet_mean
from manifolds.product import Product
from manifolds.scale import ScaleQuotient

__all__ = [
    "BuresWasserstein",
    "Elementwise",
    "FactorPair",
    "FixedRank",
    "FrechetMean",
    "ProblemReport",
    "Product",
    "QuotientManifold",
    "ScaleQuotient",
    "frechet_mean",
]

_momentum.install()
