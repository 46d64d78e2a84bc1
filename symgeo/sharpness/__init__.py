"""Sharpness that does not depend on a gauge nobody chose, and its rank correlation with generalization."""

from symgeo.sharpness.average import average_sharpness
from symgeo.sharpness.correlation import RankCorrelation, kendall
from symgeo.sharpness.in_place import in_place_sharpness
from symgeo.sharpness.result import SharpnessResult
from symgeo.sharpness.worst_case import adaptive_sharpness, euclidean_sharpness, geodesic_sharpness

__all__ = [
    "RankCorrelation",
    "SharpnessResult",
    "adaptive_sharpness",
    "average_sharpness",
    "euclidean_sharpness",
    "geodesic_sharpness",
    "in_place_sharpness",
    "kendall",
]
