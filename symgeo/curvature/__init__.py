"""Curvature from one gradient: averages over symmetry orbits, and the exact algebra of invariant operators."""

from symgeo.curvature.assembly import Bucket
from symgeo.curvature.average import orbit_average, orbit_mean
from symgeo.curvature.decomposition import Decomposition
from symgeo.curvature.dense import DenseBlock
from symgeo.curvature.estimators import Moments, hessian, trivial_block
from symgeo.curvature.gauge import balance, dual
from symgeo.curvature.one_gradient import estimate, precondition
from symgeo.curvature.operator import InvariantOperator
from symgeo.curvature.structured import StructuredBlock

__all__ = [
    "Bucket",
    "Decomposition",
    "DenseBlock",
    "InvariantOperator",
    "Moments",
    "StructuredBlock",
    "balance",
    "dual",
    "estimate",
    "hessian",
    "orbit_average",
    "orbit_mean",
    "precondition",
    "trivial_block",
]
