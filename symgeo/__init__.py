"""symgeo: the geometry of loss landscapes that respects the symmetries of neural networks.

Declare (or find) the group that acts on a model's parameters; manifolds, sharpness and the rest follow.
Submodules load on first use, so that ``import symgeo`` and the command line's help stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "SymmetryError": "symgeo.errors",
    "functional_loss": "symgeo.functional",
    "Symmetry": "symgeo.symmetry",
    "Action": "symgeo.symmetry",
    "Element": "symgeo.symmetry",
    "CheckReport": "symgeo.symmetry",
    "check": "symgeo.symmetry",
    "find_symmetry": "symgeo.models",
    "count": "symgeo.nullity",
    "CountReport": "symgeo.nullity",
    "ParameterManifold": "symgeo.geometry",
    "SharpnessResult": "symgeo.sharpness",
    "geodesic_sharpness": "symgeo.sharpness",
    "adaptive_sharpness": "symgeo.sharpness",
    "euclidean_sharpness": "symgeo.sharpness",
    "average_sharpness": "symgeo.sharpness",
    "in_place_sharpness": "symgeo.sharpness",
}
_MODULES = (
    "groups", "symmetry", "models", "nullity", "kernels", "distributed", "geometry", "curvature", "optim",
    "preconditioner", "sharpness", "hessian", "flatness", "data", "study", "loading", "batches", "demo", "plots",
    "report", "merge",
)

if TYPE_CHECKING:
    from symgeo.errors import SymmetryError
    from symgeo.functional import functional_loss
    from symgeo.geometry import ParameterManifold
    from symgeo.models import find_symmetry
    from symgeo.nullity import CountReport, count
    from symgeo.sharpness import (
        SharpnessResult,
        adaptive_sharpness,
        average_sharpness,
        euclidean_sharpness,
        geodesic_sharpness,
        in_place_sharpness,
    )
    from symgeo.symmetry import Action, CheckReport, Element, Symmetry, check


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"symgeo.{name}")
    if name == "manifolds":
        return import_module("manifolds")
    raise AttributeError(f"module 'symgeo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOMES, *_MODULES, "__version__", "manifolds"])


__all__ = [
    "Action",
    "CheckReport",
    "CountReport",
    "Element",
    "ParameterManifold",
    "SharpnessResult",
    "Symmetry",
    "SymmetryError",
    "adaptive_sharpness",
    "average_sharpness",
    "check",
    "count",
    "euclidean_sharpness",
    "find_symmetry",
    "functional_loss",
    "geodesic_sharpness",
    "in_place_sharpness",
]
