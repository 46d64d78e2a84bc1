"""Which symmetries a model has: family tables, generators derived from structure, and the search."""

from symgeo.models.find import Findings, examine, find_symmetry
from symgeo.models.folding import Unfold, fold_norms

__all__ = ["Findings", "Unfold", "examine", "find_symmetry", "fold_norms"]
