"""Which symmetries a model has: family tables, generators derived from structure, and the search."""

from symgeo.models.find import find_symmetry

__all__ = ["find_symmetry"]
