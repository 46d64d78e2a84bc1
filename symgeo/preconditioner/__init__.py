"""What preconditioner a symmetry makes of a model: blocks, state, cost, and the method that it is known as."""

from symgeo.preconditioner.declared import read_symmetry
from symgeo.preconditioner.describe import describe
from symgeo.preconditioner.report import PreconditionerReport

__all__ = ["PreconditionerReport", "describe", "read_symmetry"]
