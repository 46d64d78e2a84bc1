"""Optimizers from symmetries: pick the group, get the preconditioner."""

from symgeo.optim import presets
from symgeo.optim.symo import SymO

__all__ = ["SymO", "presets"]
