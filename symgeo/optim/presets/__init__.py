"""Choices of the group, and so of the method: each takes a model and returns what `symgeo.optim.SymO` takes.

All take ``exclude=``, names of parameters or modules, or modules.
"""

from symgeo.optim.presets.attention import attention
from symgeo.optim.presets.lora import lora
from symgeo.optim.presets.matrices import adam, muon, shampoo
from symgeo.optim.presets.mlp import mlp

__all__ = ["adam", "attention", "lora", "mlp", "muon", "shampoo"]
