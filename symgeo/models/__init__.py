"""Which symmetries a model has: family tables, generators derived from structure, and the search."""

from symgeo.models.disk import disk_name, on_disk
from symgeo.models.find import Findings, examine, find_symmetry
from symgeo.models.folding import Unfold, fold_norms
from symgeo.models.logits import logit_symmetry

__all__ = ["Findings", "Unfold", "disk_name", "examine", "find_symmetry", "fold_norms", "logit_symmetry", "on_disk"]
